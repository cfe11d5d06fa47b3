"""Published files: read with the right values, written so that the published tools can read them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, Golden, fails_with, images_in, run_cli, tiny_network

from dnnlib.errors import UserError
from dnnlib.util import EasyDict
from generate_images import main as generate
from reconstruct_phema import main as reconstruct
from snapshot_tool import main as snapshot_tool
from torch_utils import safe_pickle
from torch_utils.safe_pickle import PersistentObject
from training.encoders import RawLatentEncoder, StabilityVAEEncoder, StandardRGBEncoder
from training.networks.edm2 import Precond
from training.networks.toy import ToyModel
from training.snapshot import load_network, open_snapshot, save_network

OFFICIAL = GOLDEN / "official"
COND = OFFICIAL / "network-snapshot-0008388-0.050.pkl"
UNCOND = OFFICIAL / "edm2-img512-xs-uncond-2147483-0.015.pkl"
TOY = OFFICIAL / "toy-clsA-layers03-dim32.pkl"


def stored_tensors(path) -> dict[str, torch.Tensor]:
    file = open_snapshot(path)
    return {name: file.get_tensor(name) for name in file.names}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name], b[name]), name


def one_hot(classes) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.as_tensor(classes), 10).float()


# ---------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(("name", "path"), [("cond", COND), ("uncond", UNCOND)])
def test_official_networks(name, path, check):
    golden = Golden("official_pickles")
    labels = one_hot(golden["cond_label_idx"]) if name == "cond" else None
    net = load_network(path).net
    check(net(golden[f"{name}_x"], golden[f"{name}_sigma"], labels), golden[f"{name}_D_x"], 1e-5)


def test_official_metadata():
    uncond = load_network(UNCOND)
    assert uncond.metadata["nimg"] == 2 << 30
    assert uncond.metadata["ema_std"] == 0.015
    assert uncond.metadata["dataset_kwargs"]["path"] == "datasets/img512-sd.zip"
    assert uncond.metadata["loss_kwargs"] == {"P_mean": -0.8, "P_std": 1.6, "sigma_data": 0.5}
    assert isinstance(uncond.encoder, StabilityVAEEncoder)
    assert uncond.encoder.init_kwargs == StabilityVAEEncoder().init_kwargs
    cond = load_network(COND)
    assert (cond.metadata["nimg"], cond.metadata["ema_std"]) == (8 << 20, 0.05)
    assert isinstance(cond.encoder, StandardRGBEncoder)
    json.dumps([uncond.metadata, cond.metadata])


def test_official_toy_model(check):
    net = load_network(TOY).net
    assert isinstance(net, ToyModel)
    golden = Golden("toy")
    net.load_state_dict(golden.state("model"))
    check(net.logp(golden["model_x"], golden["model_sigma"]), golden["model_logp"], 1e-5)
    check(net.score(golden["model_x"], golden["model_sigma"]), golden["model_score"], 1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("phema-0.030", ["--outstd=0.030"]),
        ("phema-0.150", ["--outstd=0.150"]),
        ("phema-0.080-at-25165kimg", ["--outstd=0.080", "--outkimg=25165"]),
    ],
)
def test_reconstruction_from_official_snapshots(name, options, tmp_path, check):
    golden = Golden("official_pickles")
    result = run_cli(reconstruct, f"--indir={OFFICIAL / 'raw-snapshots'}", f"--outdir={tmp_path}", *options)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".pkl"
    tensors = stored_tensors(path)
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    expected = golden.state(name)
    assert tensors.keys() == expected.keys()
    actual = torch.cat([tensors[key].flatten() for key in expected])
    check(actual, torch.cat([tensor.flatten() for tensor in expected.values()]), 1e-5)


def test_mixed_directory(tmp_path):
    for path in (OFFICIAL / "raw-snapshots").iterdir():
        target = tmp_path / path.name
        if "0.100" in path.name:
            target = target.with_suffix(".safetensors")
            result = run_cli(snapshot_tool, "convert", path, target)
            assert result.exit_code == 0, result.output
        else:
            target.write_bytes(path.read_bytes())
    result = run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.150")
    assert result.exit_code == 0, result.output
    mixed = tmp_path / "phema-0033554-0.150.safetensors"
    assert result.output.splitlines()[-1] == str(mixed)
    options = [f"--indir={OFFICIAL / 'raw-snapshots'}", f"--outdir={tmp_path}", "--outstd=0.150"]
    assert run_cli(reconstruct, *options, "--outprefix=plain", "--format=safetensors").exit_code == 0
    assert_same_tensors(stored_tensors(mixed), stored_tensors(tmp_path / "plain-0033554-0.150.safetensors"))
    # A converted copy beside its source is no second snapshot.
    source = OFFICIAL / "raw-snapshots" / "network-snapshot-0033554-0.100.pkl"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    assert run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.150").exit_code == 0


def test_images_of_an_official_network(tmp_path):
    args = [f"--net={COND}", f"--gnet={COND}", "--guidance=1.5", "--seeds=0-1", "--steps=2"]
    assert run_cli(generate, *args, f"--outdir={tmp_path / 'pkl'}").exit_code == 0
    native = tmp_path / "native.safetensors"
    assert run_cli(snapshot_tool, "convert", COND, native).exit_code == 0
    args = [f"--net={native}", f"--gnet={COND}", "--guidance=1.5", "--seeds=0-1", "--steps=2"]
    assert run_cli(generate, *args, f"--outdir={tmp_path / 'native'}").exit_code == 0
    ours, theirs = (images_in(tmp_path / name) for name in ("native", "pkl"))
    assert ours.keys() == {"000000.png", "000001.png"}
    for name, image in ours.items():
        np.testing.assert_array_equal(image, theirs[name])


def test_toy_models_make_no_images(tmp_path):
    fails_with(run_cli(generate, f"--net={TOY}", f"--outdir={tmp_path}"), TOY.name, "ToyModel, which makes no images")


# ---------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("path", [COND, UNCOND, TOY])
def test_round_trip(path, tmp_path):
    first, back = tmp_path / "a-0008388-0.050.safetensors", tmp_path / "b.pkl"
    assert run_cli(snapshot_tool, "convert", path, first).exit_code == 0
    assert run_cli(snapshot_tool, "convert", first, back).exit_code == 0
    assert_same_tensors(stored_tensors(path), stored_tensors(back))
    before, after = open_snapshot(path).metadata, open_snapshot(back).metadata
    for key in ("nimg", "ema_std", "encoder", "dataset_kwargs", "loss_kwargs"):
        assert before.get(key) == after.get(key)
    assert before["architecture"]["name"] == after["architecture"]["name"]
    kwargs = after["architecture"]["kwargs"]
    assert {**kwargs, **before["architecture"]["kwargs"]} == kwargs


def as_published_tools(path: Path, tmp_path: Path) -> dict:
    command = [sys.executable, "load.py", str(path), str(tmp_path / "out.pt")]
    env = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "tests" / "published", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out.pt", weights_only=True)


@pytest.mark.parametrize("encoder", [StandardRGBEncoder(), StabilityVAEEncoder()])
@pytest.mark.parametrize("label_dim", [0, 10])
def test_published_tools_read_what_we_write(encoder, label_dim, tmp_path):
    net = tiny_network(
        img_channels=4, label_dim=label_dim, attn_resolutions=[4], channel_mult=[1, 2, 2], clip_act=None, dropout=0.1
    )
    config = dict(P_mean=-0.3, P_std=1.1, data="my data.zip", cond=True, precision="fp32")
    save_network(tmp_path / "net.pkl", net, encoder, dict(nimg=1000, config=config), dtype=torch.float32)
    theirs = as_published_tools(tmp_path / "net.pkl", tmp_path)
    assert_same_tensors(theirs["state"], dict(net.state_dict()))
    assert theirs["init_kwargs"] == {"use_fp16": False, **net.init_kwargs}
    Precond(**{key: value for key, value in theirs["init_kwargs"].items() if key != "use_fp16"}).load_state_dict(
        theirs["state"]
    )
    assert theirs["dataset_kwargs"] == dict(
        class_name="training.dataset.ImageFolderDataset", path="my data.zip", use_labels=True
    )
    assert theirs["loss"] == dict(P_mean=-0.3, P_std=1.1)
    assert theirs["encoder"] == type(encoder).__name__
    if isinstance(encoder, StabilityVAEEncoder):
        mean, std = torch.tensor(encoder.raw_mean), torch.tensor(encoder.raw_std)
        x = torch.randn(5, 4)
        torch.testing.assert_close(x * theirs["scale"] + theirs["bias"], (x - mean) / std * 0.5)


def test_toy_models_for_the_published_tools(tmp_path):
    net = ToyModel(num_layers=2, hidden_dim=8)
    save_network(tmp_path / "toy.pkl", net, StandardRGBEncoder(), {}, dtype=torch.float32)
    theirs = as_published_tools(tmp_path / "toy.pkl", tmp_path)
    assert_same_tensors(theirs["state"], dict(net.state_dict()))
    assert theirs["init_kwargs"] == net.init_kwargs
    for name in ("ToyModel", "MPLinear", "MPSiLU"):
        assert name in theirs["repr"]


def attributes_by_class(record: PersistentObject) -> dict[str, dict[str, set]]:
    """Attributes of all modules of a network's record: by class and name, the values (of modules and tensors: the type)."""
    found: dict[str, dict[str, set]] = {}
    todo = [record]
    while todo:
        module = todo.pop()
        todo += [child for child in module.state["_modules"].values() if child is not None]
        attributes = found.setdefault(module.class_name, {})
        for key, value in module.state.items():
            if key not in ("_init_args", "_init_kwargs"):
                names = set(value) if isinstance(value, dict) else {repr(value)}
                attributes.setdefault(key, set()).update(names)
    return found


@pytest.mark.parametrize("path", [COND, UNCOND, TOY])
def test_attributes_are_those_of_the_published_classes(path, tmp_path):
    assert run_cli(snapshot_tool, "convert", path, tmp_path / "a.safetensors").exit_code == 0
    assert run_cli(snapshot_tool, "convert", tmp_path / "a.safetensors", tmp_path / "a.pkl").exit_code == 0
    theirs, ours = (safe_pickle.load(file) for file in (path, tmp_path / "a.pkl"))
    theirs, ours = (data["ema"] if isinstance(data, dict) else data for data in (theirs, ours))
    assert attributes_by_class(ours) == attributes_by_class(theirs)
    assert (
        ours.init_kwargs.items()
        >= {**theirs.init_kwargs, **({} if path == TOY else {"use_fp16": theirs.state["use_fp16"]})}.items()
    )


def test_what_pickles_keep(tmp_path):
    save_network(
        tmp_path / "net.pkl", tiny_network(), StandardRGBEncoder(), dict(nimg=1234, ema_std=0.07, config={"a": 1})
    )
    metadata = load_network(tmp_path / "net.pkl").metadata
    assert (metadata["nimg"], metadata["ema_std"], metadata["config"]) == (1234, 0.07, {"a": 1})
    stored = stored_tensors(tmp_path / "net.pkl")
    for name, tensor in tiny_network().named_parameters():
        assert torch.equal(stored[name], tensor.half())
    for name, tensor in tiny_network().named_buffers():
        assert torch.equal(stored[name].float(), tensor)  # rounded, these would change the features


def test_noise_embeddings_that_the_published_tools_lack(tmp_path):
    for name, value in (("noise_embedding", "positional"), ("noise_bandwidth", 0.5)):
        with pytest.raises(UserError, match=f"the published tools know no {name.replace('_', ' ')} {value}, which"):
            save_network(tmp_path / "net.pkl", tiny_network(**{name: value}), StandardRGBEncoder(), {})
    assert list(tmp_path.iterdir()) == []
    net = tiny_network(noise_embedding="fourier", noise_bandwidth=1.0)
    save_network(tmp_path / "net.pkl", net, StandardRGBEncoder(), {})
    assert not {"noise_embedding", "noise_bandwidth"} & safe_pickle.load(tmp_path / "net.pkl")["ema"].init_kwargs.keys()


def test_encoder_that_the_published_tools_lack(tmp_path):
    with pytest.raises(UserError, match="the published tools have no RawLatentEncoder"):
        save_network(tmp_path / "net.pkl", tiny_network(), RawLatentEncoder([0.0], [1.0]), {})
    assert list(tmp_path.iterdir()) == []


def record(class_name: str, **state) -> PersistentObject:
    return PersistentObject(class_name, {"_init_args": (), "_init_kwargs": {}, **state}, module="somewhere")


def test_whitening_by_other_final_statistics(tmp_path):
    kwargs = dict(final_mean=1, final_std=[2.0] * 4, raw_std=np.array([1.0, 2, 3, 4]), raw_mean=[1.0] * 4)
    encoder = record("StabilityVAEEncoder", _init_args=("somewhere/vae",), _init_kwargs=kwargs)
    data = {**restored(safe_pickle.load(UNCOND)), "encoder": encoder}
    ours = load_network(write(tmp_path, data)).encoder
    assert isinstance(ours, StabilityVAEEncoder)
    assert ours.vae_name == "somewhere/vae"
    x = torch.randn(2, 4, 3, 3)
    mean_and_std = torch.cat([x, torch.zeros_like(x)], dim=1)
    std = torch.tensor([1.0, 2, 3, 4]).reshape(-1, 1, 1)
    torch.testing.assert_close(ours.encode_latents(mean_and_std), (x - 1) / std * 2 + 1)


# ---------------------------------------------------------------------------------------------------------
# Files of other kinds


def write(tmp_path: Path, data) -> Path:
    safe_pickle.save(tmp_path / "file.pkl", data)
    return tmp_path / "file.pkl"


def module(class_name: str) -> PersistentObject:
    return record(class_name, _modules={}, _parameters={}, _buffers={})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (EasyDict(ema=module("EDMPrecond")), r"file.pkl: holds an EDM \(2022\) network \(EDMPrecond\)"),
        (dict(G=module("Generator"), G_ema=module("Generator")), r"file.pkl: holds a StyleGAN network \(Generator\)"),
        (EasyDict(ema=module("SongUNet")), "file.pkl: unknown architecture 'SongUNet'"),
        (EasyDict(net=module("Precond")), "file.pkl: holds no network 'ema', only 'net'"),
        ([1, 2], "file.pkl: a pickle, but not of a network"),
        (EasyDict(fid=dict(mu=np.zeros(2), sigma=np.eye(2))), "file.pkl: holds reference statistics"),
    ],
)
def test_other_pickles(data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_network(write(tmp_path, data))


def test_which(tmp_path):
    path = write(tmp_path, {"ema": module("SongUNet"), "net": module("EDMPrecond")})
    with pytest.raises(UserError, match="EDMPrecond"):
        load_network(path, which="net")


def test_tensors_that_do_not_fit(tmp_path):
    data = dict(ema=safe_pickle.load(COND)["ema"])
    del data["ema"].state["_modules"]["logvar_fourier"].state["_buffers"]["phases"]
    with pytest.raises(UserError, match="do not fit the architecture: they lack logvar_fourier.phases"):
        load_network(write(tmp_path, restored(data)))


def restored(value):
    """What was read, in a form that can be written."""
    if isinstance(value, safe_pickle.StoredTensor):
        return safe_pickle.LazyTensor(value.load, True)
    if isinstance(value, dict):
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, PersistentObject):
        return PersistentObject(value.class_name, restored(value.state), value.module or "somewhere")
    return value
