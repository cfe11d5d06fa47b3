"""Published checkpoints of score_sde: architectures found from shapes, files converted both ways, and hostile files."""

import os
import pickle

import numpy as np
import pytest
import torch
from conftest import fails_with, images_in, run_cli, tiny_uvit

from dnnlib.errors import UserError
from generate_images import main as generate
from snapshot_tool import main as snapshot_tool
from training.conditioning import DataSpec
from training.config.score_sde_presets import SCORE_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.networks.score_sde import ScoreSDE
from training.snapshot import load_network, published_uvit, save_network
from training.snapshot.published_score_sde import read
from training.snapshot.score_sde_shapes import architecture_for

# One preset of each kind of network.
KINDS = [
    "ve/cifar10_ncsnpp",
    "ve/cifar10_ncsnpp_continuous",
    "ve/cifar10_ddpm",
    "ve/church_ncsnpp_continuous",
    "ve/ncsn/cifar10",
    "ve/ncsnv2/cifar10",
    "ve/ncsnv2/bedroom",
    "vp/cifar10_ncsnpp_continuous",
    "vp/ddpm/cifar10_unconditional",
    "subvp/cifar10_ddpmpp_continuous",
    "subvp/cifar10_ddpm_continuous",
    "digits-ve",
]


def small(preset: str, **changes) -> ScoreSDE:
    """A small network of a preset's kind."""
    chosen = SCORE_PRESETS[preset]
    network = chosen.config.network
    if network.model in ("ncsn", "ncsnv2"):
        sizes = {"nf": 8, "num_scales": 7}
    else:
        sizes = {"nf": 32 if network.model == "ddpm" else 16, "ch_mult": (1, 2), "num_res_blocks": 1}
    torch.manual_seed(0)
    data = DataSpec(channels=3, resolution=chosen.resolution)
    return ScoreSDE(data, **{**network.to_json(), **sizes, **changes})


def saved(path, preset: str = "digits-vp", **changes) -> ScoreSDE:
    net = small(preset, **changes)
    save_network(path, net, StandardRGBEncoder(*net.spec.pixel_range), {"nimg": 6400})
    return net


def assert_same(found: torch.nn.Module, net: torch.nn.Module) -> None:
    assert list(found.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize("preset", KINDS)
def test_sizes_come_from_shapes(tmp_path, preset):
    net = saved(tmp_path / "a.pth", preset)
    snapshot = load_network(tmp_path / "a.pth", preset=preset)
    assert_same(snapshot.net, net)
    assert snapshot.net.spec == net.spec and f"that of preset {preset}" in snapshot.note
    wanted = net.init_kwargs
    assert {key: snapshot.net.init_kwargs[key] for key in wanted} == wanted
    assert snapshot.encoder.decode(torch.tensor([[[[net.spec.pixel_range[1]]]]])).item() == 255


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("ve/cifar10_ncsnpp_continuous", {"ch_mult": (1, 1, 2), "num_res_blocks": 2, "attn_resolutions": (32, 8)}),
        ("ve/church_ncsnpp_continuous", {"ch_mult": (2, 2), "attn_resolutions": (128,)}),
        ("vp/cifar10_ddpmpp", {"ch_mult": (1, 1), "num_res_blocks": 3}),
        ("vp/cifar10_ddpmpp", {"conditional": False, "ch_mult": (1, 3, 1)}),
        ("vp/ddpm/cifar10", {"ch_mult": (1, 1, 2), "num_res_blocks": 2}),
        ("ve/ncsnv2/cifar10", {"plan": 256, "sigma_max": 12.5, "num_scales": 20}),
    ],
)
def test_other_sizes(tmp_path, preset, changes):
    net = saved(tmp_path / "a.pth", preset, **changes)
    found = load_network(tmp_path / "a.pth", preset=preset).net
    assert_same(found, net)
    assert {key: found.init_kwargs[key] for key in changes} == changes


def state_of(preset: str) -> dict[str, torch.Tensor]:
    """Names and shapes of the weights of a preset's own network, with its noise levels."""
    network = SCORE_PRESETS[preset].config.network
    with torch.device("meta"):
        net = preset_network(SCORE_PRESETS[preset]).net
    state = net.state_dict()
    if "sigmas" in state:
        levels = np.exp(np.linspace(np.log(network.sigma_max), np.log(network.sigma_min), len(state["sigmas"])))
        state["sigmas"] = torch.from_numpy(levels)
    return state


@pytest.mark.parametrize(
    ("preset", "alone"),
    [
        ("ve/cifar10_ncsnpp_continuous", True),
        ("vp/ddpm/cifar10_unconditional", True),
        ("ve/ncsn/cifar10", True),
        ("ve/ncsnv2/bedroom", True),
        ("digits-ve", True),
        ("digits-subvp", False),
    ],
)
def test_published_networks_are_known(preset, alone):
    found = architecture_for(state_of(preset), preset)
    assert found.is_preset and found.network == SCORE_PRESETS[preset].config.network
    if alone:
        assert architecture_for(state_of(preset), None) == found
    else:
        with pytest.raises(UserError, match=rf"fit .*{preset}.*: name the one with --arch"):
            architecture_for(state_of(preset), None)


def test_presets_that_weights_are_not_of(tmp_path):
    saved(tmp_path / "ve.pth", "digits-ve")
    fails(tmp_path / "ve.pth", "not those of preset digits-vp: the first differing key is ", preset="digits-vp")
    fails(tmp_path / "ve.pth", "not those of preset ve/ncsn/cifar10: the first", preset="ve/ncsn/cifar10")
    fails(tmp_path / "ve.pth", "'digits' is no preset of train_score_sde.py", preset="digits")
    fails(tmp_path / "ve.pth", "of no preset's size: name the preset that it is most like with --arch")
    saved(tmp_path / "ncsn.pth", "ve/ncsnv2/cifar10")
    fails(tmp_path / "ncsn.pth", "normalizer.embed.weight, which is missing", preset="ve/ncsn/cifar10")


def test_conversion_both_ways(tmp_path):
    net = saved(tmp_path / "a.pth")
    arch = "--arch=digits-vp"
    native, back = tmp_path / "a.safetensors", tmp_path / "b.pth"
    fails_with(run_cli(snapshot_tool, "convert", tmp_path / "a.pth", native), "a.pth: ", "--arch")
    assert not native.exists()
    for source, dest in [(tmp_path / "a.pth", native), (native, back)]:
        assert run_cli(snapshot_tool, "convert", source, dest, arch).exit_code == 0
    assert_same(load_network(native).net, net)  # which says itself what it is
    assert_same(load_network(back, preset="digits-vp").net, net)
    first, second = read(tmp_path / "a.pth"), read(back)
    assert list(first.state) == list(second.state) and (first.step, first.decay) == (second.step, second.decay)
    text = run_cli(snapshot_tool, "inspect", tmp_path / "a.pth", arch).output
    assert "score_sde.ScoreSDE" in text


def test_formats_by_the_name_of_the_family(tmp_path):
    saved(tmp_path / "a.pth")
    native = tmp_path / "native" / "a.safetensors"
    assert run_cli(snapshot_tool, "convert", tmp_path / "a.pth", native, "--arch=digits-vp").exit_code == 0
    for source, dest in [(native, tmp_path / "b.pth"), (native.parent, tmp_path / "folder")]:
        result = run_cli(snapshot_tool, "convert", source, dest, "--format=score_sde")
        assert result.exit_code == 0, result.output
    assert (tmp_path / "b.pth").read_bytes() == (tmp_path / "folder" / "a.pth").read_bytes()
    for options, message in [
        (
            ["c.safetensors", "--format=score_sde"],
            "c.safetensors: the --format that is asked for is that of .pth files",
        ),
        (
            ["c.pth", "--format=uvit"],
            "a.safetensors: holds a network of score_sde.ScoreSDE, which --format=uvit is not for",
        ),
    ]:
        fails_with(run_cli(snapshot_tool, "convert", native, tmp_path / options[0], options[1]), message)
    assert not (tmp_path / "c.pth").exists() and not (tmp_path / "c.safetensors").exists()


def test_images_of_a_checkpoint(tmp_path):
    saved(tmp_path / "a.pth", "digits-ve")
    options = [f"--net={tmp_path / 'a.pth'}", "--seeds=0-1", "--steps=2"]
    fails_with(run_cli(generate, *options, f"--outdir={tmp_path / 'x'}"), "a.pth: ", "--arch")
    result = run_cli(generate, *options, f"--outdir={tmp_path / 'out'}", "--arch=digits-ve")
    assert result.exit_code == 0, result.output
    assert "sizes of its network are those of its weights" in result.output
    assert all(image.shape == (8, 8, 3) for image in images_in(tmp_path / "out").values())


def test_older_files_of_torch_are_read(tmp_path):
    net = saved(tmp_path / "a.pth")
    data = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save(data, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(load_network(tmp_path / "old.pth", preset="digits-vp").net, net)


def test_numbers_of_numpy(tmp_path):
    net = saved(tmp_path / "a.pth")
    data = torch.load(tmp_path / "a.pth", weights_only=True)
    data["step"], data["optimizer"]["param_groups"][0]["lr"] = np.int64(7), np.float64(2e-4)
    data["ema"]["decay"] = np.float32(0.5)
    torch.save(data, tmp_path / "numpy.pth")
    checkpoint = read(tmp_path / "numpy.pth")
    assert (checkpoint.step, checkpoint.decay) == (7, 0.5)
    assert checkpoint.optimizer["param_groups"][0]["lr"] == 2e-4
    assert_same(load_network(tmp_path / "numpy.pth", preset="digits-vp").net, net)


# ---------------------------------------------------------------------------------------------------------
# Files that are damaged, hostile, or something else


def fails(path, *fragments: str, preset: str | None = None) -> None:
    with pytest.raises(UserError) as err:
        load_network(path, preset=preset)
    message = str(err.value)
    assert "\n" not in message and len(message) < 700
    assert all(fragment in message for fragment in (str(path), *fragments)), message


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.pth")
    data = torch.load("a.pth", weights_only=True)
    for key in ("step", "optimizer"):
        torch.save({**data, key: Hostile()}, f"{key}.pth")
        fails(f"{key}.pth", "system', which no published file needs", "nothing in the file was run")
    torch.save({**data, "step": Hostile()}, "old.pth", _use_new_zipfile_serialization=False)
    fails("old.pth", "nothing in the file was run")
    with open("plain.pth", "wb") as f:
        pickle.dump({"ema": {"shadow_params": Hostile()}}, f)
    fails("plain.pth")
    assert not (tmp_path / "hostile-code-ran").exists()


def test_damaged_files(tmp_path):
    net = saved(tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    for share in (0, 0.1, 0.5, 0.99):
        (tmp_path / "short.pth").write_bytes(data[: int(len(data) * share)])
        fails(tmp_path / "short.pth", preset="digits-vp")
    for position in np.random.default_rng(0).integers(0, len(data), 12):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        (tmp_path / "flipped.pth").write_bytes(flipped)
        message = ""
        try:  # padding between parts, dates and the like may be anything
            assert_same(load_network(tmp_path / "flipped.pth", preset="digits-vp").net, net)
        except UserError as err:
            message = str(err)
        assert not message or ("flipped.pth" in message and "\n" not in message)
    fails(tmp_path / "missing.pth", "missing.pth")


def set_weight(key: str, value):
    """A change of a weight and its average."""

    def change(data: dict) -> None:
        names = [name for name in data["model"] if name != "module.sigmas"]
        data["model"][key] = value
        if key in names:
            data["ema"]["shadow_params"][names.index(key)] = value

    return change


BIAS = "module.all_modules.0.bias"


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda d: d.pop("step"), ("'model', 'ema' and 'step'", "'step'")),
        (lambda d: d.pop("model"), ("'model', 'ema' and 'step'",)),
        (lambda d: d.update(model=[1, 2]), ("'model', 'ema' and 'step'",)),
        (lambda d: d.update(ema=None), ("'model', 'ema' and 'step'",)),
        (lambda d: d.update(step="many"), ("'model', 'ema' and 'step'",)),
        (lambda d: d["ema"].update(decay=None), ("'model', 'ema' and 'step'",)),
        (lambda d: d["ema"].update(shadow_params=3), ("'model', 'ema' and 'step'",)),
        (lambda d: d["ema"]["shadow_params"].pop(), ("averages do not belong",)),
        (lambda d: d["ema"]["shadow_params"].reverse(), ("averages do not belong",)),
        (lambda d: d["model"].update({3: torch.ones(1)}), ("'model', 'ema' and 'step'",)),
        (lambda d: d["model"].update({"module.x\ny": 3}), ("no tensor of floating-point weights",)),
        (set_weight(BIAS, torch.ones(64, dtype=torch.int64)), ("no tensor of floating-point weights",)),
        (set_weight(BIAS, torch.ones(0)), ("no tensor of floating-point weights",)),
        (set_weight(BIAS, torch.eye(64).to_sparse()), ("no tensor of floating-point weights",)),
        (set_weight(BIAS, torch.ones(1).expand(1 << 40)), ("share their values",)),
        (set_weight(BIAS, torch.full([64], float("nan"))), ("holds NaN or infinity",)),
        (set_weight(BIAS, torch.ones(63)), ("all_modules.0.bias, of shape [63] instead of [64]",)),
        (set_weight("module.sigmas", torch.full([1000], float("nan"), dtype=torch.float64)), ("sigma",)),
        (set_weight("module.sigmas", torch.ones(1 << 17, dtype=torch.float64)), ("--num-scales must be at most",)),
        (set_weight("module.sigmas", torch.ones(1000)), ("sigmas is not of type float64",)),
        (set_weight("module.all_modules.2.weight", torch.ones(0, 3, 3, 3)), ("no tensor of floating-point",)),
        (set_weight("module.all_modules.2.weight", torch.ones(1, 3, 3, 3)), ("make no network like that of preset digits-vp",)),
        (set_weight("module.all_modules.2.weight", torch.ones(16)), ("make no network like that of preset digits-vp",)),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tmp_path, change, fragments):
    saved(tmp_path / "a.pth")
    data = torch.load(tmp_path / "a.pth", weights_only=True)
    change(data)
    torch.save(data, tmp_path / "b.pth")
    fails(tmp_path / "b.pth", *fragments, preset="digits-vp")


def test_files_of_other_kinds(tmp_path):
    published_uvit.write(tmp_path / "uvit.pth", tiny_uvit().net.state_dict())
    fails(tmp_path / "uvit.pth", preset="digits-vp")
    torch.save({"state_dict": {"prior.ftr0": torch.ones(3)}, "epoch": 3, "args": {}}, tmp_path / "nvae.pth")
    fails(tmp_path / "nvae.pth", preset="digits-vp")
    torch.save(["shadow_params"], tmp_path / "list.pth")
    fails(tmp_path / "list.pth", "not a checkpoint of score_sde, but a list", preset="digits-vp")
    (tmp_path / "text.pth").write_bytes(b"shadow_params" * 100)
    fails(tmp_path / "text.pth", "damaged checkpoint", preset="digits-vp")


def test_what_checkpoints_cannot_hold(tmp_path):
    net = small("digits-vp")
    torch.nn.init.constant_(next(net.parameters()), float("inf"))
    with pytest.raises(UserError, match=r"a\.pth: not written, .* would hold NaN or infinity"):
        save_network(tmp_path / "a.pth", net, StandardRGBEncoder(), {})
    assert not list(tmp_path.iterdir())
