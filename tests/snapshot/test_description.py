"""What a snapshot says of itself: both formats, unknown names, and hostile values."""

import json
import struct
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_cli, tiny_network

from dnnlib.errors import UserError
from snapshot_tool import main as snapshot_tool
from torch_utils import safe_pickle
from torch_utils.safe_pickle import PersistentObject
from training.conditioning import Conditioning, DataSpec
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.snapshot import load_network, open_snapshot, read_metadata, save_network
from training.snapshot.description import Description, Part, describe


def edit_metadata(path, **changes):
    """Change fields of a snapshot's JSON block in the file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = {**json.loads(header["__metadata__"]["openedm2"]), **changes}
    header["__metadata__"]["openedm2"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


FULL = Description(
    architecture=Part("edm2.Precond", {"img_resolution": 8}),
    encoder=Part("StandardRGBEncoder", {}),
    preconditioning=Part("Epsilon", {"beta_min": 0.1}),
    text_encoder={"name": "TextEncoder", "kwargs": {"tokens": 77}},
    data=DataSpec(channels=3, resolution=8, conditioning=Conditioning(kind="vector", size=768)),
    class_names=["cat", "dog"],
    nimg=5,
    ema_std=0.1,
    config={"lr": 0.01},
    dataset={"count": 10},
    code_version="0.1.0",
    source="a.pkl",
    license="mit",
    reconstructed_from=["a.safetensors"],
    dataset_kwargs={"path": "a.zip"},
    loss_kwargs={"P_mean": -0.4},
    use_fp16=True,
    notes={"command": "train"},
)


def test_every_field_is_kept():
    block = json.loads(json.dumps(FULL.to_json()))
    assert block.keys() == {field.name for field in fields(Description)}
    assert block["format_version"] == 2
    assert Description.from_json("x", block) == FULL
    for key in block.keys() - {"format_version", "architecture", "encoder"}:
        assert Description.from_json("x", {**block, key: None}) != FULL
        with pytest.raises(UserError, match=f"x: its description is damaged: {key} is not of type"):
            Description.from_json("x", {**block, key: "5" if key == "nimg" else 5})


def test_what_a_network_says_of_itself(tmp_path):
    metadata = {"nimg": 5, "command": "train", "license": "mit"}
    description = describe(tiny_network(), RawLatentEncoder([1.0], [2.0]), metadata)
    assert description.architecture == Part("edm2.Precond", tiny_network().init_kwargs)
    assert description.encoder == Part("RawLatentEncoder", {"raw_mean": [1.0], "raw_std": [2.0]})
    assert description.data == DataSpec(channels=1, resolution=8, conditioning=Conditioning(kind="classes", size=10))
    assert (description.nimg, description.license, description.notes) == (5, "mit", {"command": "train"})
    assert describe(tiny_network(label_dim=0), StandardRGBEncoder(), {}).data == DataSpec(channels=1, resolution=8)
    # In a file, and saved again.
    for name in ("a.safetensors", "b.pkl"):
        save_network(tmp_path / name, tiny_network(), StandardRGBEncoder(), metadata)
        snapshot = load_network(tmp_path / name)
        assert snapshot.metadata["command"] == "train" and "notes" not in snapshot.metadata
        save_network(tmp_path / name, snapshot.net, snapshot.encoder, snapshot.metadata)
        assert load_network(tmp_path / name).metadata == snapshot.metadata


def test_what_is_saved_is_what_is_there(tmp_path):
    """Metadata of another network does not make a file that contradicts itself."""
    path = tmp_path / "a.safetensors"
    save_network(path, tiny_network(), StandardRGBEncoder(), {"nimg": 5})
    vectors = {
        "channels": 1,
        "resolution": 8,
        "conditioning": {"kind": "vector", "size": 10, "tokens": 0, "optional": False},
    }
    metadata = {**read_metadata(path), "data": vectors, "preconditioning": {"name": "x", "kwargs": {}}, "notes": [1]}
    save_network(path, tiny_network(), StandardRGBEncoder(), metadata)
    assert load_network(path).metadata == {
        **read_metadata(path),
        "data": {**vectors, "pixel_range": [-1, 1]},
        "nimg": 5,
        "notes": [1],
    }
    save_network(path, tiny_network(label_dim=0), RawLatentEncoder([1.0], [2.0]), metadata)
    snapshot = load_network(path)
    assert snapshot.metadata["data"] == {
        **vectors,
        "conditioning": {**vectors["conditioning"], "kind": "none", "size": 0},
        "pixel_range": [-1, 1],
    }
    assert isinstance(snapshot.encoder, RawLatentEncoder) and snapshot.metadata["nimg"] == 5


def test_metadata_that_cannot_be_kept(tmp_path):
    for metadata, message in [
        ({"config": object()}, "net.safetensors: its metadata must be JSON values"),
        ({"nimg": 1.5}, "nimg is not of type int"),
        ({"note": float("nan")}, "damaged"),
    ]:
        with pytest.raises(UserError, match=message):
            save_network(tmp_path / "net.safetensors", tiny_network(), StandardRGBEncoder(), metadata)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------
# Format 1


def test_files_of_format_1(tmp_path, snapshot_file):
    before = load_network(snapshot_file)
    state = {name: tensor.clone() for name, tensor in before.net.state_dict().items()}  # it is mapped from the file
    edit_metadata(snapshot_file, format_version=1, data=None, command="train", dataset_kwargs={"path": "a.zip"})
    after = load_network(snapshot_file)
    facts = {"command": "train", "dataset_kwargs": {"path": "a.zip"}}
    assert after.metadata == {**before.metadata, **facts, "format_version": 1}
    assert open_snapshot(snapshot_file).description.notes["command"] == "train"
    for name, tensor in state.items():
        assert torch.equal(tensor, after.net.state_dict()[name])
    assert run_cli(snapshot_tool, "convert", snapshot_file, tmp_path / "new.safetensors").exit_code == 0
    assert load_network(tmp_path / "new.safetensors").metadata == {**after.metadata, "format_version": 2}


@pytest.mark.parametrize("path", sorted((ROOT / "models" / "toy").glob("*.safetensors")), ids=lambda path: path.stem)
def test_models_of_earlier_code(path):
    metadata = load_network(path).metadata
    assert metadata["format_version"] == 1 and metadata["architecture"]["name"] == "toy.ToyModel"
    assert metadata["command"].startswith("python toy_example.py train") and metadata["nimg"] > 0


# ---------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format_version=99), "format version 99"),
        (dict(architecture={"name": "os.system", "kwargs": {}}), "unknown architecture 'os.system'"),
        (dict(encoder={"name": "eval", "kwargs": {}}), "unknown encoder 'eval'"),
        (dict(architecture=3), "architecture is not of type dict"),
        (dict(nimg="many"), "nimg is not of type int"),
        (dict(config=5), "config is not of type dict"),
        (dict(dataset_kwargs={"a": 10**400}), "damaged"),
        (dict(ema_std=float("nan")), "damaged"),
        (dict(source="\ud800"), "damaged"),
        (dict(architecture={"name": "edm2.Precond"}), "incomplete"),
        (dict(architecture={"name": ["edm2.Precond"], "kwargs": {}}), "incomplete"),
        (dict(architecture={"name": "edm2.Precond", "kwargs": 5}), "incomplete"),
        (dict(architecture={"name": "edm2.Precond", "kwargs": {}, "more": 1}), "incomplete"),
        (dict(architecture=None), "incomplete"),
        (dict(preconditioning={"name": "os.system", "kwargs": {}}), "unknown preconditioning 'os.system'"),
        (dict(bogus=1), "has an unknown entry 'bogus'"),
        (dict(data={"channels": 1, "resolution": 8}), "do not fit"),
        (dict(data={"channels": 1, "resolution": 8, "conditioning": 5}), "incomplete"),
        (dict(data={"channels": 3, "resolution": 8, "conditioning": {"kind": "classes", "size": 10}}), "do not fit"),
        (dict(data={"channels": 1, "resolution": 8, "conditioning": {"kind": "classes", "size": 9}}), "do not fit"),
        (
            dict(data={"channels": 1, "resolution": 8, "conditioning": {"kind": "text", "size": 10}}),
            "kind must be one of",
        ),
        (dict(data={"channels": [1], "resolution": {}, "conditioning": {"kind": [], "size": 10}}), "kind must be text"),
        (dict(architecture={"name": "edm2.Precond", "kwargs": {"bogus": 1}}), "do not fit"),
        (dict(encoder={"name": "StandardRGBEncoder", "kwargs": {"bogus": 1}}), "do not fit"),
        (
            dict(
                architecture={
                    "name": "edm2.Precond",
                    "kwargs": {"img_resolution": 8, "img_channels": 1, "label_dim": 0, "channel_mult": []},
                }
            ),
            "do not fit",
        ),
    ],
)
def test_unknown_content(snapshot_file, changes, message):
    edit_metadata(snapshot_file, **changes)
    with pytest.raises(UserError, match=message):
        load_network(snapshot_file)


def test_classes_may_be_vectors(snapshot_file):
    data = {
        "channels": 1,
        "resolution": 8,
        "conditioning": {"kind": "vector", "size": 10, "tokens": 0, "optional": False},
    }
    edit_metadata(snapshot_file, data=data)
    assert load_network(snapshot_file).metadata["data"] == {**data, "pixel_range": [-1, 1]}


def test_weights_of_another_size(snapshot_file):
    kwargs = read_metadata(snapshot_file)["architecture"]["kwargs"]
    edit_metadata(snapshot_file, architecture={"name": "edm2.Precond", "kwargs": {**kwargs, "model_channels": 16}})
    with pytest.raises(UserError, match="do not fit the architecture") as err:
        load_network(snapshot_file)
    assert "\n" not in str(err.value)


def hostile_network(tmp_path: Path, **kwargs) -> Path:
    state = dict(_init_args=(), _init_kwargs=kwargs, _parameters={}, _buffers={}, _modules={})
    safe_pickle.save(tmp_path / "net.pkl", dict(ema=PersistentObject("Precond", state, "somewhere")))
    return tmp_path / "net.pkl"


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(num_blocks=10**7),
        dict(channel_mult=[1] * 1000),
        dict(model_channels=10**12),
        dict(model_channels=-1),
        dict(model_channels=64.5),
        dict(sigma_data="0.5"),
        dict(label_dim=None),
        dict(img_resolution=1 << 40),
        dict(channels_per_head=0),
        dict(img_resolution=0, channel_mult=[1] * 8),
        dict(model_channels=4093, channel_mult=[61] * 8, channels_per_head=1),
        dict(resample_filter=[1, -1]),
        dict(resample_filter=[1, 1, 1]),
        dict(resample_filter=1),
        dict(clip_act=-1),
        dict(res_balance=1e308),
        dict(concat_balance=[1, 2]),
        dict(sigma_data=0),
        dict(bogus=1),
    ],
)
def test_networks_that_would_take_forever(kwargs, tmp_path):
    defaults = dict(img_resolution=8, img_channels=1, label_dim=0)
    with pytest.raises(UserError, match="do not fit the architecture"):
        load_network(hostile_network(tmp_path, **{**defaults, **kwargs}))


def test_arguments_of_the_encoder_do_not_hide_those_of_the_network(tmp_path):
    record = safe_pickle.load(hostile_network(tmp_path, num_layers=10**9))["ema"]
    record = PersistentObject("ToyModel", record.state, "somewhere")
    encoder = PersistentObject("StabilityVAEEncoder", dict(_init_args=(), _init_kwargs=dict(num_layers=1)), "somewhere")
    safe_pickle.save(tmp_path / "net.pkl", dict(ema=record, encoder=encoder))
    with pytest.raises(UserError, match="num_layers must be at most 64, not 1000000000"):
        load_network(tmp_path / "net.pkl")


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(raw_mean={"a": 1}), dict(raw_mean="abc"), dict(raw_mean=[[1.0], 2.0]), dict(final_mean="abc"), dict(final_std=0),
        dict(final_mean=[0.0] * 3), dict(raw_std=[1e308] * 4), dict(raw_std=[-1.0] * 4), dict(bogus=1), dict(vae_name=5),
        dict(raw_mean=[0.0] * 5, raw_std=[1.0] * 5),
    ],
)  # fmt: skip
def test_hostile_encoders(kwargs, tmp_path):
    record = safe_pickle.load(hostile_network(tmp_path, img_resolution=8, img_channels=4, label_dim=0))["ema"]
    record.module = "somewhere"
    encoder = PersistentObject("StabilityVAEEncoder", dict(_init_args=(), _init_kwargs=kwargs), "somewhere")
    safe_pickle.save(tmp_path / "net.pkl", dict(ema=record, encoder=encoder))
    with pytest.raises(UserError, match="encoder|do not fit"):
        load_network(tmp_path / "net.pkl")


def test_texts_of_metadata_do_not_reach_the_terminal_raw(tmp_path):
    metadata = dict(source="\x1b[31m\nfake: line", code_version="\x1b[0m")
    save_network(tmp_path / "a.safetensors", tiny_network(), StandardRGBEncoder(), metadata)
    output = run_cli(snapshot_tool, "inspect", tmp_path / "a.safetensors").output
    assert "\x1b" not in output and "\nfake" not in output
