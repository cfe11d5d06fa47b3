"""The command lines: every option, every preset, and what bad input is told."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from conftest import (
    DIGITS,
    GOLDEN,
    ROOT,
    TINY,
    fails_with,
    make_dataset,
    png,
    random_images,
    run_cli,
    tiny_network,
    torchrun,
)
from write_cli_docs import render

from calculate_metrics import main as metrics_tool
from count_flops import main as count_flops
from dnnlib.util import UserError
from generate_images import main as generate
from reconstruct_phema import main as reconstruct
from snapshot_tool import main as snapshot_tool
from train_edm2 import main as train
from training.config.edm2 import GENERATION_PRESETS, TRAINING_PRESETS, GenerationPreset
from training.config.training import TrainConfig
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.samplers.coefficients import SOLVERS
from training.snapshot import load_network, open_snapshot, save_network
from training.snapshot.reconstruction import list_averages, reconstruct_phema

sys.path.insert(0, str(ROOT / "scripts"))

COMMANDS = {
    "train_edm2": train,
    "generate_images": generate,
    "reconstruct_phema": reconstruct,
    "count_flops": count_flops,
}


def images_in(folder: Path) -> dict[str, np.ndarray]:
    return {str(p.relative_to(folder)): np.asarray(PIL.Image.open(p)) for p in sorted(folder.rglob("*.png"))}


def options_of(command, args: list[str]) -> set[str]:
    """Names of the parameters that a command line sets."""
    names = {option: p.name for p in command.params for option in [*p.opts, *p.secondary_opts]}
    return {names[arg.split("=")[0]] for arg in args if arg.startswith("-")}


def assert_all_options(command, args: list[str]) -> None:
    assert options_of(command, args) == {p.name for p in command.params if p.name != "help"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with snapshots at three times."""
    path = tmp_path_factory.mktemp("cli") / "run"
    result = run_cli(train, f"--outdir={path}", f"--data={DIGITS}", *TINY, "--duration=3Ki")
    assert result.exit_code == 0, result.output
    return path


def test_help_equals_docs():
    assert (ROOT / "docs" / "cli.md").read_text() == render(), "run python scripts/write_cli_docs.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_through_the_shell(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: {name}.py [OPTIONS]")
    assert done.stderr == ""


# ---------------------------------------------------------------------------------------------------------
# train_edm2.py


@pytest.mark.parametrize("preset", TRAINING_PRESETS)
def test_presets_dry_run(preset, tmp_path):
    size = {"edm2-img512": 64, "edm2-img64": 64, "digits": 8}[preset.rsplit("-", 1)[0]]
    data = DIGITS if preset == "digits" else make_dataset(tmp_path / "data.zip", random_images(1, size=size))
    result = run_cli(
        train,
        f"--outdir={tmp_path / 'run'}",
        f"--data={data}",
        f"--cond={int(preset == 'digits')}",
        f"--preset={preset}",
        "-n",
    )
    assert result.exit_code == 0, result.output
    assert "Dry run; exiting." in result.output
    assert not (tmp_path / "run").exists()


def test_all_training_options(tmp_path):
    ref = tmp_path / "ref.safetensors"
    options = [f"--data={DIGITS}", f"--dest={ref}", "--metrics=fd_pixels", "--workers=0"]
    assert run_cli(metrics_tool, "ref", *options).exit_code == 0
    args = [
        f"--outdir={tmp_path}", f"--data={DIGITS}", "--cond=1", "--preset=digits", "--duration=64", "--batch=32", "--channels=8",
        "--dropout=0.1", "--P_mean=-0.8", "--P_std=1.6", "--lr=0.02", "--decay=100", "--batch-gpu=16", "--fp16=1", "--ls=2",
        "--bench=0", "--status=32", "--snapshot=1024", "--checkpoint=1024", "--seed=3", "--precision=fp32", "--device=cpu",
        "--channel-mult=1,2", "--num-blocks=2", "--attn-resolutions=4", "--ema-std=0.01,0.02,...,0.04", "--workers=1", "--resume", "--xflip=1", "--cache=1",
        "--metrics=fd_pixels", f"--metrics-ref={ref}", "--metrics-num=2", "--compile=0",
        "--checkpoint-activations=1",
    ]  # fmt: skip
    result = run_cli(train, *args)
    assert result.exit_code == 0, result.output
    assert_all_options(train, [*args, "-n"])
    config = TrainConfig.load(tmp_path / "training_options.json")
    expected = dict(
        cond=True, preset="digits", duration=64, batch=32, channels=8, dropout=0.1, P_mean=-0.8, P_std=1.6, lr=0.02, decay=100,
        batch_gpu=16, ls=2, bench=False, status=32, snapshot=1024, checkpoint=1024, seed=3, precision="fp32", device="cpu",
        channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,), ema_std=(0.01, 0.02, 0.03, 0.04), workers=1, xflip=True,
        cache=True, metrics=("fd_pixels",), metrics_ref=str(ref), metrics_num=2, compile=False,
        checkpoint_activations=True,
    )  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert len(list(tmp_path.glob("network-snapshot-*"))) == 4
    net = load_network(tmp_path / "network-snapshot-0000000-0.010.safetensors").net
    assert "unet.enc.4x4_block1.attn_qkv.weight" in net.state_dict()


def test_units(tmp_path):
    result = run_cli(
        train, f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits", "--duration=1.5Gi", "--snapshot=2Mi", "-n"
    )
    assert "duration:         1610612736" in result.output
    assert "snapshot:         2097152" in result.output


def test_fp16_alias(tmp_path):
    common = [f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits", "-n"]
    assert 'precision:        "fp32"' in run_cli(train, *common, "--fp16=0").output
    fails_with(run_cli(train, *common, "--fp16=0", "--precision=bf16"), "--fp16=0 contradicts --precision=bf16")


def test_attention_that_is_nowhere_is_noted(tmp_path):
    result = run_cli(
        train, f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits", "--attn-resolutions=16", "-n"
    )
    assert "no level has a resolution of --attn-resolutions=16 (levels: 8, 4)" in result.output


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--preset=edm2-img512-xss"], ["unknown preset 'edm2-img512-xss'", "edm2-img512-xs"]),
        (["--batch=100", "--batch-gpu=33"], ["--batch=100 is not divisible by processes x --batch-gpu = 1 x 33"]),
        (["--status=100"], ["--status=100 must be multiples of --batch=128"]),
        (["--snapshot=1000"], ["--snapshot=1000 must be multiples of --batch=128"]),
        (["--checkpoint=129"], ["--checkpoint=129 must be multiples"]),
        (["--snapshot=512"], ["--snapshot must be at least 1000 images"]),
        (["--duration=12Xi"], ["--duration", "'12Xi' is not a number of images"]),
        (["--duration=0"], ["--duration must be at least 1"]),
        (["--batch=-1"], ["--batch", "'-1' is not a number of images"]),
        (["--duration=1e400"], ["--duration", "is not a number of images"]),
        (["--channel-mult=1,2,3,4,5"], ["resolution 8 is not divisible by 16", "--channel-mult"]),
        (["--channel-mult=1,x"], ["--channel-mult", "'x' is not a number"]),
        (["--channel-mult=none"], ["--channel-mult needs one positive number per level"]),
        (["--attn-resolutions=8;4"], ["--attn-resolutions"]),
        (["--ema-std=0.05,2"], ["--ema-std", "between 0.001 and 0.289"]),
        (["--dropout=1"], ["--dropout must be at least 0 and less than 1"]),
        (["--lr=0"], ["--lr must be positive"]),
        (["--P_std=0"], ["--P_std must be positive"]),
        (["--P_mean=nan"], ["--P_mean must be a finite number, not nan"]),
        (["--ls=inf"], ["--ls must be a finite number"]),
        (["--decay=inf"], ["--decay must be a finite number"]),
        (["--duration=1e99"], ["--duration", "is not a number of images"]),
        (["--ema-std=0.0501,0.0502"], ["--ema-std", "share a file name"]),
        (["--ema-std=0.1,0.1000000000001,...,0.2"], ["--ema-std", "even steps"]),
        (["--seed=4294967296"], ["--seed"]),
        (["--channels=0"], ["--channels must be at least 1"]),
        (["--seed=-1"], ["--seed"]),
        (["--precision=fp8"], ["--precision", "fp8"]),
        (["--device=tpu"], ["--device"]),
        (["--bogus"], ["--bogus"]),
        (["--data=nowhere.zip"], ["nowhere.zip: no such dataset"]),
    ],
)  # fmt: skip
def test_bad_training_options(tmp_path, options, fragments):
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits", *options)
    fails_with(result, *fragments)
    assert not (tmp_path / "run").exists()


def test_missing_options_are_one_line():
    fails_with(run_cli(train), "--outdir")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_device_that_is_not_there(tmp_path):
    fails_with(
        run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", "--device=cuda"), "--device=cuda is not available"
    )


def test_bad_data(tmp_path):
    def try_data(files, labels=None):
        data = make_dataset(tmp_path / f"{len(list(tmp_path.iterdir()))}.zip", files, labels)
        return run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--preset=digits")

    fails_with(try_data(random_images(2)), "--cond=1 needs labels")
    odd = {**random_images(2), "odd.png": png(np.zeros([16, 16, 3], np.uint8))}
    fails_with(
        try_data(odd, {name: 0 for name in odd}), "odd.png is 16x16 with 3 channels, but 00000/img00000000.png is 8x8"
    )
    oblong = {"a.png": png(np.zeros([8, 9], np.uint8))}
    fails_with(try_data(oblong, {"a.png": 0}), "a.png is 9x8 with 1 channel, not square")
    (tmp_path / "text.zip").write_text("no zip")
    fails_with(
        run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={tmp_path / 'text.zip'}"),
        "text.zip: not a complete ZIP",
    )
    assert not (tmp_path / "run").exists()


def test_damaged_image_in_a_loader_process(tmp_path):
    files = random_images(150)
    # One that is not among the 100 of reals.png, so that the loader meets it first.
    name = f"00000/img{np.random.default_rng(0).permutation(150)[100]:08d}.png"
    files[name] = files[name][:100]
    data = make_dataset(tmp_path / "data.zip", files)
    for workers in (0, 1):
        result = run_cli(
            train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--cond=0", *TINY, f"--workers={workers}"
        )
        fails_with(result, f"{data}: cannot read {name}")


def test_outdir_of_another_run(run):
    def again(*options):
        return run_cli(train, f"--outdir={run}", f"--data={DIGITS}", *TINY, "--duration=3Ki", *options)

    for options, fragment in [
        (["--lr=0.1"], "was trained with --lr=0.04, not 0.1"),
        (["--batch=128"], "--batch=256, not 128"),
        (["--channel-mult=1,1"], "--channel-mult=1, not 1,1"),
        (["--seed=1"], "--seed=0, not 1"),
        (["--P_mean=0"], "--P_mean=-0.4, not 0.0"),
        (["--ema-std=0.05"], "--ema-std=0.05,0.1, not 0.05"),
        (["--cond=0"], "--cond=1, not 0"),
        (["--no-resume"], "already holds a run"),
    ]:
        fails_with(again(*options), str(run), fragment)
    changeable = again(
        "--status=256",
        "--snapshot=0",
        "--checkpoint=0",
        "--batch-gpu=128",
        "--device=cpu",
        "--precision=bf16",
        "--workers=1",
    )
    assert changeable.exit_code == 0, changeable.output


def test_other_data_under_the_same_name(run, tmp_path):
    files = random_images(10, channels=None)
    data = make_dataset(tmp_path / "other.zip", files, {name: i for i, name in enumerate(files)})
    result = run_cli(train, f"--outdir={run}", f"--data={data}", *TINY, "--duration=3Ki")
    fails_with(result, "was trained on other data", "count was 1797, is 10")
    with zipfile.ZipFile(DIGITS) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name.endswith(".png")}
    for label_dim, change in [(7, "label_dim was 10, is 7"), (10, "their content differs")]:
        relabeled = make_dataset(
            tmp_path / f"{label_dim}.zip", files, {name: i % label_dim for i, name in enumerate(files)}
        )
        fails_with(run_cli(train, f"--outdir={run}", f"--data={relabeled}", *TINY, "--duration=3Ki"), change)
    moved = shutil.copy(DIGITS, tmp_path / "moved.zip")
    assert run_cli(train, f"--outdir={run}", f"--data={moved}", *TINY, "--duration=3Ki").exit_code == 0


def test_damaged_options_file(tmp_path):
    (tmp_path / "training_options.json").write_text("{")
    (tmp_path / "training-state-0000001.pt").write_bytes(b"")
    fails_with(
        run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY), "training_options.json: not the options"
    )


def test_outdir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    fails_with(run_cli(train, f"--outdir={tmp_path / 'file'}", f"--data={DIGITS}", *TINY), "--outdir", "is a file")


# ---------------------------------------------------------------------------------------------------------
# generate_images.py


def test_all_generation_options(run, tmp_path):
    net, gnet = (run / f"network-snapshot-{name}.safetensors" for name in ("0000003-0.100", "0000001-0.050"))
    args = [
        f"--net={net}", f"--gnet={gnet}", f"--outdir={tmp_path / 'out'}", "--subdirs", "--seeds=1,2,999-1001", "--class=3",
        "--batch=2", "--sampler=euler", "--steps=4", "--sigma_min=0.01", "--sigma_max=40", "--rho=5", "--guidance=2", "--S_churn=5", "--S_min=0.1",
        "--S_max=10", "--S_noise=1.01", "--guidance-interval=0.1,5", "--precision=bf16", "--compile=1", "--device=cpu",
        f"--grid={tmp_path / 'grid.png'}", "--skip-existing", "--offline",
    ]  # fmt: skip
    result = run_cli(generate, *args)
    assert result.exit_code == 0, result.output
    # The rest is tested below.
    assert_all_options(generate, [*args, "--preset=x", "--print-config", "--list-presets"])
    names = {"000000/000001.png", "000000/000002.png", "000000/000999.png", "001000/001000.png", "001000/001001.png"}
    images = images_in(tmp_path / "out")
    assert images.keys() == names
    assert all(image.shape == (8, 8) and image.dtype == np.uint8 for image in images.values())
    with PIL.Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 72 - 8, 2 * 72 - 8)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "option",
    ["--class=3", "--sigma_min=0.1", "--sigma_max=20", "--rho=3", "--S_churn=8", "--guidance=3", "--steps=5"]
    + [f"--sampler={name}" for name in SOLVERS if name != "heun"],
)
def test_each_option_changes_the_image(run, tmp_path, option):
    net, gnet = (run / f"network-snapshot-{name}.safetensors" for name in ("0000003-0.100", "0000001-0.050"))
    for name, extra in [("plain", []), ("changed", [option])]:
        run_cli(
            generate, f"--net={net}", f"--gnet={gnet}", f"--outdir={tmp_path / name}", "--seeds=7", "--steps=4", *extra
        )
    assert not np.array_equal(
        images_in(tmp_path / "plain")["000007.png"], images_in(tmp_path / "changed")["000007.png"]
    )


def test_an_image_depends_on_its_seed_alone(snapshot_file, tmp_path):
    """Batch sizes, other seeds, their order, and one against two processes."""
    common = ["--steps=6", "--S_churn=10"]
    for name, options in [
        ("a", ["--seeds=0-6", "--batch=7"]),
        ("b", ["--seeds=5,3,0-2", "--batch=2"]),
        ("c", ["--seeds=6,4", "--batch=1"]),
    ]:
        assert (
            run_cli(generate, f"--net={snapshot_file}", f"--outdir={tmp_path / name}", *common, *options).exit_code == 0
        )
    args = [
        "generate_images.py",
        f"--net={snapshot_file}",
        f"--outdir={tmp_path / 'd'}",
        *common,
        "--seeds=0-6",
        "--batch=2",
    ]
    done = torchrun(2, *args, f"--grid={tmp_path / 'd.png'}", timeout=120)
    assert done.returncode == 0, done.stderr
    a, b, c, d = (images_in(tmp_path / name) for name in "abcd")
    assert a.keys() == d.keys() == b.keys() | c.keys()
    for name, image in {**b, **c}.items():
        assert np.abs(image.astype(int) - a[name]).max() <= 1
        assert np.abs(image.astype(int) - d[name]).max() <= 1
    assert len({image.tobytes() for image in a.values()}) == 7


def test_interrupted_generation_continues(snapshot_file, tmp_path):
    args = [f"--net={snapshot_file}", f"--outdir={tmp_path / 'out'}", "--seeds=0-3", "--steps=3", "--skip-existing"]
    run_cli(generate, *args)
    (tmp_path / "out" / "000002.png").unlink()
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    result = run_cli(generate, *args)
    assert "Generating 1 images" in result.output
    assert "(3 are there)" in result.output
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.name in times} == times
    assert (tmp_path / "out" / "000002.png").is_file()
    assert run_cli(generate, *args, f"--grid={tmp_path / 'grid.png'}").exit_code == 0  # nothing left to generate
    assert (tmp_path / "grid.png").is_file()


def test_color_and_latents(tmp_path):
    save_network(tmp_path / "rgb.safetensors", tiny_network(img_channels=3, label_dim=0), StandardRGBEncoder(), {})
    run_cli(
        generate,
        f"--net={tmp_path / 'rgb.safetensors'}",
        f"--outdir={tmp_path / 'rgb'}",
        "--seeds=1",
        "--steps=2",
        f"--grid={tmp_path / 'grid.png'}",
    )
    assert images_in(tmp_path / "rgb")["000001.png"].shape == (8, 8, 3)
    save_network(
        tmp_path / "raw.safetensors", tiny_network(img_channels=2), RawLatentEncoder([0.0, 1.0], [1.0, 2.0]), {}
    )
    args = [f"--net={tmp_path / 'raw.safetensors'}", f"--outdir={tmp_path / 'raw'}", "--seeds=1", "--steps=2"]
    assert run_cli(generate, *args).exit_code == 0
    assert np.load(tmp_path / "raw" / "000001.npy").shape == (2, 8, 8)
    fails_with(run_cli(generate, *args, f"--grid={tmp_path / 'grid.png'}"), "--grid needs a network that makes pixels")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--seeds="], ["--seeds", "is not a number"]),
        (["--seeds=1-x"], ["--seeds", "'1-x' is not a number or a range"]),
        (["--seeds=5-"], ["--seeds", "'5-' is not a number or a range"]),
        (["--seeds=-3"], ["--seeds", "'-3' is not a number or a range"]),
        (["--seeds=0-99999999999"], ["--seeds", "is longer than"]),
        (["--sigma_max=inf"], ["--sigma_max must be a finite number"]),
        (["--S_noise=nan"], ["--S_noise must be a finite number"]),
        (["--S_max=nan"], ["--S_max must be a finite number"]),
        (["--rho=1e-300"], ["rho=1e-300", "no finite noise levels"]),
        (["--seeds=5-1"], ["--seeds", "the range 5-1 runs backwards"]),
        (["--seeds=1,1"], ["--seeds", "names a seed twice"]),
        (["--class=10"], ["--class=10 is out of range: the classes are 0 to 9"]),
        (["--class=-1"], ["--class=-1 is out of range"]),
        (["--guidance=2"], ["--guidance=2 needs a guiding network: give --gnet"]),
        (["--guidance-interval=2,1"], ["--guidance-interval", "LO must be less than HI"]),
        (["--guidance-interval=a"], ["--guidance-interval", "is not of the form LO,HI"]),
        (["--sigma_min=100"], ["--sigma_min=100 is above --sigma_max=80"]),
        (["--steps=0"], ["--steps"]),
        (["--sampler=rk4"], ["--sampler", "rk4"]),
        (["--sampler=dpmpp-2m", "--S_churn=5"], ["S_churn=5 adds noise, which dpmpp-2m cannot follow", "use heun or euler"]),
        (["--batch=0"], ["--batch"]),
        (["--net=nowhere.safetensors"], ["nowhere.safetensors: no such file"]),
        (["--gnet=nowhere.safetensors", "--guidance=2"], ["nowhere.safetensors: no such file"]),
    ],
)  # fmt: skip
def test_bad_generation_options(snapshot_file, tmp_path, options, fragments):
    fails_with(run_cli(generate, f"--net={snapshot_file}", f"--outdir={tmp_path / 'out'}", *options), *fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        (dict(img_resolution=16), "--gnet has resolution 16, but --net has 8"),
        (dict(img_channels=3), "--gnet has number of channels 3, but --net has 1"),
        (dict(label_dim=7), "--gnet has 7 classes, but --net has 10"),
    ],
)
def test_guide_that_does_not_fit(snapshot_file, tmp_path, kwargs, fragment):
    save_network(tmp_path / "guide.safetensors", tiny_network(**kwargs), StandardRGBEncoder(), {})
    args = [
        f"--net={snapshot_file}",
        f"--gnet={tmp_path / 'guide.safetensors'}",
        f"--outdir={tmp_path / 'out'}",
        "--guidance=2",
    ]
    fails_with(run_cli(generate, *args), fragment)


def test_guide_for_other_latents(snapshot_file, tmp_path):
    save_network(tmp_path / "guide.safetensors", tiny_network(), RawLatentEncoder([0.0], [1.0]), {})
    args = [
        f"--net={snapshot_file}",
        f"--gnet={tmp_path / 'guide.safetensors'}",
        f"--outdir={tmp_path / 'out'}",
        "--guidance=2",
    ]
    fails_with(run_cli(generate, *args), "works on other latents")


def test_grid_of_images_of_two_networks(snapshot_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000001.png").write_bytes(png(np.zeros([9, 9], np.uint8)))
    (tmp_path / "out" / "000002.png").write_bytes(b"")  # not an image: made again
    args = [
        f"--net={snapshot_file}",
        f"--outdir={tmp_path / 'out'}",
        "--seeds=0-2",
        "--steps=2",
        "--skip-existing",
        f"--grid={tmp_path / 'g.png'}",
    ]
    fails_with(run_cli(generate, *args), "000001.png differs in size")
    assert images_in(tmp_path / "out")["000002.png"].shape == (8, 8)


def test_many_channels_are_saved_as_arrays(tmp_path):
    save_network(tmp_path / "net.safetensors", tiny_network(img_channels=5, label_dim=0), StandardRGBEncoder(), {})
    assert (
        run_cli(
            generate, f"--net={tmp_path / 'net.safetensors'}", f"--outdir={tmp_path}", "--seeds=0", "--steps=2"
        ).exit_code
        == 0
    )
    assert np.load(tmp_path / "000000.npy").dtype == np.uint8


def test_unconditional_guide_is_classifier_free_guidance(snapshot_file, tmp_path):
    save_network(tmp_path / "guide.safetensors", tiny_network(label_dim=0), StandardRGBEncoder(), {})
    args = [
        f"--net={snapshot_file}",
        f"--gnet={tmp_path / 'guide.safetensors'}",
        f"--outdir={tmp_path / 'out'}",
        "--guidance=2",
        "--seeds=0",
        "--steps=2",
    ]
    assert run_cli(generate, *args).exit_code == 0
    fails_with(
        run_cli(generate, f"--net={tmp_path / 'guide.safetensors'}", f"--outdir={tmp_path}", "--class=0"),
        "knows no classes",
    )


def test_truncated_snapshot(snapshot_file, tmp_path):
    snapshot_file.write_bytes(snapshot_file.read_bytes()[:-100])
    fails_with(
        run_cli(generate, f"--net={snapshot_file}", f"--outdir={tmp_path / 'out'}"), str(snapshot_file), "truncated"
    )


@pytest.mark.parametrize("name", GENERATION_PRESETS)
def test_generation_presets(name, tmp_path):
    """What each preset stands for, as a command line that a shell splits as it should."""
    preset = GENERATION_PRESETS[name]
    result = run_cli(
        generate, f"--preset={name}", f"--outdir={tmp_path / 'my images'}", "--seeds=0-9", "--print-config"
    )
    assert result.exit_code == 0, result.output
    words = shlex.split(result.output.replace("\\\n", " "))
    guide = [f"--gnet={preset.gnet}", f"--guidance={preset.guidance:g}"] if preset.gnet else []
    expected = ["python", "generate_images.py", f"--net={preset.net}", *guide, f"--outdir={tmp_path / 'my images'}"]
    assert words == [*expected, "--seeds=0-9"]
    assert not (tmp_path / "my images").exists()


# Preset, network, guide, guidance, result; copied from the publications.
PUBLISHED = """
img512-xs-fid img512-xs-2147483-0.135 - 1 3.53
img512-xs-dino img512-xs-2147483-0.200 - 1 103.39
img512-s-fid img512-s-2147483-0.130 - 1 2.56
img512-s-dino img512-s-2147483-0.190 - 1 68.64
img512-m-fid img512-m-2147483-0.100 - 1 2.25
img512-m-dino img512-m-2147483-0.155 - 1 58.44
img512-l-fid img512-l-1879048-0.085 - 1 2.06
img512-l-dino img512-l-1879048-0.155 - 1 52.25
img512-xl-fid img512-xl-1342177-0.085 - 1 1.96
img512-xl-dino img512-xl-1342177-0.155 - 1 45.96
img512-xxl-fid img512-xxl-0939524-0.070 - 1 1.91
img512-xxl-dino img512-xxl-0939524-0.150 - 1 42.84
img64-s-fid img64-s-1073741-0.075 - 1 1.58
img64-m-fid img64-m-2147483-0.060 - 1 1.43
img64-l-fid img64-l-1073741-0.040 - 1 1.33
img64-xl-fid img64-xl-0671088-0.040 - 1 1.33
img512-xs-guid-fid img512-xs-2147483-0.045 img512-xs-uncond-2147483-0.045 1.40 2.91
img512-xs-guid-dino img512-xs-2147483-0.150 img512-xs-uncond-2147483-0.150 1.70 79.94
img512-s-guid-fid img512-s-2147483-0.025 img512-xs-uncond-2147483-0.025 1.40 2.23
img512-s-guid-dino img512-s-2147483-0.085 img512-xs-uncond-2147483-0.085 1.90 52.32
img512-m-guid-fid img512-m-2147483-0.030 img512-xs-uncond-2147483-0.030 1.20 2.01
img512-m-guid-dino img512-m-2147483-0.015 img512-xs-uncond-2147483-0.015 2.00 41.98
img512-l-guid-fid img512-l-1879048-0.015 img512-xs-uncond-2147483-0.015 1.20 1.88
img512-l-guid-dino img512-l-1879048-0.035 img512-xs-uncond-2147483-0.035 1.70 38.20
img512-xl-guid-fid img512-xl-1342177-0.020 img512-xs-uncond-2147483-0.020 1.20 1.85
img512-xl-guid-dino img512-xl-1342177-0.030 img512-xs-uncond-2147483-0.030 1.70 35.67
img512-xxl-guid-fid img512-xxl-0939524-0.015 img512-xs-uncond-2147483-0.015 1.20 1.81
img512-xxl-guid-dino img512-xxl-0939524-0.015 img512-xs-uncond-2147483-0.015 1.70 33.09
img512-s-autog-fid img512-s-2147483-0.070 img512-xs-0134217-0.125 2.10 1.34
img512-s-autog-dino img512-s-2147483-0.120 img512-xs-0134217-0.165 2.45 36.67
img512-xxl-autog-fid img512-xxl-0939524-0.075 img512-m-0268435-0.155 2.05 1.25
img512-xxl-autog-dino img512-xxl-0939524-0.130 img512-m-0268435-0.205 2.30 24.18
img512-s-uncond-autog-fid img512-s-uncond-2147483-0.070 img512-xs-uncond-0134217-0.110 2.85 3.86
img512-s-uncond-autog-dino img512-s-uncond-2147483-0.090 img512-xs-uncond-0134217-0.125 2.90 90.39
img64-s-autog-fid img64-s-1073741-0.045 img64-xs-0134217-0.110 1.70 1.01
img64-s-autog-dino img64-s-1073741-0.105 img64-xs-0134217-0.175 2.20 31.85
"""


def test_published_facts():
    base = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-"
    expected = {}
    for line in PUBLISHED.split("\n")[1:-1]:
        name, net, gnet, guidance, value = line.split()
        metric = {"fid": "FID", "dino": "FD-DINOv2"}[name.rsplit("-", 1)[1]]
        guide = None if gnet == "-" else f"{base}{gnet}.pkl"
        expected[f"edm2-{name}"] = GenerationPreset(f"{base}{net}.pkl", metric, float(value), guide, float(guidance))
    assert expected == GENERATION_PRESETS


def test_list_presets():
    lines = run_cli(generate, "--list-presets").output.splitlines()
    assert len(lines) == 1 + len(GENERATION_PRESETS)
    row = next(line for line in lines if line.startswith("edm2-img64-s-autog-dino")).split()
    assert row[1:] == ["img64-s-1073741-0.105", "img64-xs-0134217-0.175", "2.20", "FD-DINOv2", "31.85"]
    assert "edm2-img64-s-autog-dino          FD-DINOv2 31.85" in run_cli(generate, "--help").output


def test_explicit_options_win_over_presets(run, tmp_path):
    net, gnet = (run / f"network-snapshot-{name}.safetensors" for name in ("0000003-0.100", "0000001-0.050"))
    args = ["--preset=edm2-img512-s-guid-fid", f"--net={net}", f"--outdir={tmp_path}", "--seeds=1", "--steps=2"]
    printed = run_cli(generate, *args, "--guidance=3", "--print-config").output
    assert f"--net={net}" in printed and "--guidance=3" in printed and "uncond-2147483-0.025.pkl" in printed
    result = run_cli(generate, *args, f"--gnet={gnet}")
    assert result.exit_code == 0, result.output
    with_preset = (tmp_path / "000001.png").read_bytes()
    run_cli(
        generate, f"--net={net}", f"--gnet={gnet}", "--guidance=1.4", f"--outdir={tmp_path}", "--seeds=1", "--steps=2"
    )
    assert (tmp_path / "000001.png").read_bytes() == with_preset


def test_which_network(tmp_path):
    fails_with(run_cli(generate, f"--outdir={tmp_path}"), "Give --net or --preset")
    fails_with(
        run_cli(generate, f"--outdir={tmp_path}", "--preset=edm2-img512-xxs"), "unknown preset", "edm2-img512-xs-fid"
    )


# ---------------------------------------------------------------------------------------------------------
# count_flops.py


@pytest.mark.parametrize(
    ("preset", "parameters", "gflops"),
    [
        ("edm2-img512-xxs", 31.31, 11.5),
        ("edm2-img512-xs", 124.71, 45.5),
        ("edm2-img512-s", 280.21, 101.9),
        ("edm2-img512-m", 497.81, 180.8),
        ("edm2-img512-l", 778, 282),
        ("edm2-img512-xl", 1120, 406),
        ("edm2-img512-xxl", 1523.16, 552.1),
        ("edm2-img64-s", 280.21, 101.9),
    ],
)
def test_published_costs(preset, parameters, gflops):
    result = json.loads(run_cli(count_flops, preset, "--json").output)
    assert result["parameters"] / 1e6 == pytest.approx(parameters, rel=1e-3)
    assert result["gflops"] == pytest.approx(gflops, rel=0.005)
    assert sum(result["gflops_by_layer"].values()) == pytest.approx(result["gflops"])


def test_cost_of_files(run, snapshot_file):
    toy = GOLDEN / "official" / "toy-clsA-layers03-dim32.pkl"
    result = run_cli(count_flops, snapshot_file, f"--net={toy}", "--json")
    assert result.exit_code == 0, result.output
    ours, theirs = (json.loads(line) for line in result.output.splitlines())
    assert ours["net"] == str(snapshot_file)
    assert ours["parameters"] == sum(p.numel() for p in tiny_network().parameters())
    # One 4x32 and three 32x32 matrices.
    assert theirs["gflops_by_layer"]["linear"] == pytest.approx((4 * 32 + 3 * 32 * 32) / 1e9)
    table = run_cli(count_flops, snapshot_file).output
    for text in ("parameters", "3x3 convolution", "attention", "weight normalization"):
        assert text in table
    assert torch.cuda.is_available() or "not measured: no CUDA device" in table


def test_nothing_to_count():
    fails_with(run_cli(count_flops), "which network?", "edm2-img512-xxl")
    fails_with(run_cli(count_flops, "edm2-img512-x"), "unknown preset 'edm2-img512-x'", "edm2-img512-xs")
    fails_with(run_cli(count_flops, "nowhere.pkl"), "nowhere.pkl: no such file")


def test_dropout_costs_nothing(tmp_path):
    counts = []
    for dropout in (0.0, 0.5):
        save_network(tmp_path / "net.safetensors", tiny_network(dropout=dropout), StandardRGBEncoder(), {})
        counts.append(json.loads(run_cli(count_flops, tmp_path / "net.safetensors", "--json").output)["gflops"])
    assert counts[0] == counts[1]


@pytest.mark.gpu
def test_memory_per_sample():
    result = json.loads(run_cli(count_flops, "edm2-img512-xxs", "--json").output)
    assert 10 * 2**20 < result["peak_memory_per_sample"] < 500 * 2**20


# ---------------------------------------------------------------------------------------------------------
# python snapshot_tool.py


def test_convert_one(run, tmp_path):
    source = run / "network-snapshot-0000003-0.100.safetensors"
    half = tmp_path / "half.safetensors"
    assert run_cli(snapshot_tool, "convert", source, half, "--dtype=bf16").exit_code == 0
    stored = {name: open_snapshot(half).get_tensor(name) for name in open_snapshot(half).names}
    assert stored["unet.out_conv.weight"].dtype == torch.bfloat16
    assert stored["unet.emb_fourier.freqs"].dtype == torch.float32
    assert open_snapshot(half).metadata == open_snapshot(source).metadata


def test_convert_directory(run, tmp_path):
    result = run_cli(snapshot_tool, "convert", run, tmp_path / "pkl", "--format=pkl")
    assert result.exit_code == 0, result.output
    names = sorted(path.stem for path in run.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "pkl").iterdir()) == [f"{name}.pkl" for name in names]
    assert result.output.split() == [str(tmp_path / "pkl" / f"{name}.pkl") for name in names]
    result = run_cli(snapshot_tool, "convert", tmp_path / "pkl", tmp_path / "back", "--skip")
    for name in names:
        before, after = (open_snapshot(folder / f"{name}.safetensors") for folder in (run, tmp_path / "back"))
        for tensor in before.names:
            assert before.dtype(tensor) == after.dtype(tensor)
            assert torch.equal(before.get_tensor(tensor), after.get_tensor(tensor))
    (tmp_path / "back" / f"{names[0]}.safetensors").write_bytes(b"mine")
    result = run_cli(snapshot_tool, "convert", tmp_path / "pkl", tmp_path / "back", "--skip")
    assert (tmp_path / "back" / f"{names[0]}.safetensors").read_bytes() == b"mine"
    # In place; a second time there is nothing to do for those that are there.
    assert run_cli(snapshot_tool, "convert", tmp_path / "pkl", tmp_path / "pkl").exit_code == 0
    assert len(list((tmp_path / "pkl").iterdir())) == 2 * len(names)


def test_conversions_that_cannot_be(run, snapshot_file, tmp_path):
    (tmp_path / "empty").mkdir()
    fails_with(run_cli(snapshot_tool, "convert", tmp_path / "empty", tmp_path / "x"), "empty: no .safetensors or .pkl")
    fails_with(run_cli(snapshot_tool, "convert", snapshot_file, tmp_path / "x.bin"), "x.bin: snapshots are")
    fails_with(
        run_cli(snapshot_tool, "convert", tmp_path / "no.pkl", tmp_path / "x.pkl"), "no.pkl: no such file or directory"
    )
    fails_with(run_cli(snapshot_tool, "convert", run, snapshot_file), "a directory is converted into a directory")
    both = tmp_path / "both"
    both.mkdir()
    for suffix in (".pkl", ".safetensors"):
        assert run_cli(snapshot_tool, "convert", snapshot_file, both / f"a{suffix}").exit_code == 0
    fails_with(run_cli(snapshot_tool, "convert", both, tmp_path / "c"), "another file of that name")
    fails_with(run_cli(snapshot_tool, "bogus"), "No such command 'bogus'")
    assert run_cli(snapshot_tool).output.startswith("Usage:")
    # Nothing is written over what it is made of, or over another original.
    kept = {suffix: (both / f"a{suffix}").read_bytes() for suffix in (".pkl", ".safetensors")}
    fails_with(run_cli(snapshot_tool, "convert", both / "a.pkl", both / "a.pkl"), "is what is converted")
    for suffix in ("pkl", "safetensors"):
        result = run_cli(snapshot_tool, "convert", both, both, f"--format={suffix}", "--dtype=bf16")
        assert "Nothing to convert." in result.output
    assert kept == {suffix: (both / f"a{suffix}").read_bytes() for suffix in (".pkl", ".safetensors")}


def test_spoiled_weights_go_no_further(run, tmp_path):
    for path in run.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    spoiled = tmp_path / "network-snapshot-0000002-0.050.safetensors"
    snapshot = load_network(spoiled)
    snapshot.net.get_parameter("unet.out_conv.weight")[0, 0, 0, 0] = float("inf")
    save_network(spoiled, snapshot.net, snapshot.encoder, snapshot.metadata)
    message = "0000002-0.050.safetensors: unet.out_conv.weight holds NaN or infinity"
    fails_with(run_cli(snapshot_tool, "convert", spoiled, tmp_path / "out.pkl"), message)
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.07"), message)
    assert not (tmp_path / "out.pkl").exists() and not list(tmp_path.glob("phema*"))


def test_inspect(run, tmp_path):
    path = run / "network-snapshot-0000003-0.100.safetensors"
    text = run_cli(snapshot_tool, "inspect", path).output
    for fragment in (
        "edm2.Precond",
        "ema_std:            0.1",
        "nimg:               3072",
        "dtype:              float16",
    ):
        assert fragment in text
    facts = json.loads(run_cli(snapshot_tool, "inspect", path, "--json").output)
    assert facts["bytes"] == path.stat().st_size
    assert facts["parameters"] == sum(p.numel() for p in load_network(path).net.parameters())
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    facts = json.loads(run_cli(snapshot_tool, "inspect", tmp_path / "ref.npz", "--json").output)
    assert facts["fid"] == "mean and covariance of 3 features"


def test_export(run, tmp_path):
    source = run / "network-snapshot-0000003-0.100.safetensors"
    folder = tmp_path / "model"
    fails_with(run_cli(snapshot_tool, "export", source, folder), "under which licence? Give --license")
    assert run_cli(snapshot_tool, "export", source, folder, "--license=mit", "--dtype=fp32").exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    assert (
        card.startswith("---\nlicense: mit\n")
        and "8 x 8 x 1 images" in card
        and "| Trained on | 3,072 images |" in card
    )
    before, after = load_network(source), load_network(folder)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(before.net(x, torch.tensor(1.0)), after.net(x, torch.tensor(1.0)))
    assert after.metadata == {**before.metadata, "license": "mit"}
    result = run_cli(generate, f"--net={folder}", f"--outdir={tmp_path / 'out'}", "--seeds=1", "--steps=1")
    assert result.exit_code == 0, result.output
    # Weights without the JSON block in their header are enough, with config.json beside them.
    safetensors.torch.save_file(safetensors.torch.load_file(folder / "model.safetensors"), folder / "model.safetensors")
    assert load_network(folder).metadata == after.metadata
    # Over an export, whole or not.
    (folder / "config.json").unlink()
    assert run_cli(snapshot_tool, "export", folder / "model.safetensors", folder).exit_code == 2  # names no network
    assert run_cli(snapshot_tool, "export", source, folder, "--license=mit").exit_code == 0
    assert run_cli(snapshot_tool, "export", folder, folder).exit_code == 0  # knows its licence
    assert load_network(folder).metadata == after.metadata
    # Not over the model of another project.
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    weights = (folder / "model.safetensors").read_bytes()
    fails_with(run_cli(snapshot_tool, "export", source, folder, "--license=mit"), "config.json: format version None")
    assert (folder / "model.safetensors").read_bytes() == weights
    toy = GOLDEN / "official" / "toy-clsA-layers03-dim32.pkl"
    fails_with(run_cli(snapshot_tool, "export", toy, tmp_path / "toy", "--license=mit"), "ToyModel makes no images")


def test_licence_of_published_networks(tmp_path):
    source = GOLDEN / "official" / "edm2-img512-xs-uncond-2147483-0.015.pkl"
    assert run_cli(snapshot_tool, "convert", source, tmp_path / "a.safetensors").exit_code == 0
    assert run_cli(snapshot_tool, "export", tmp_path / "a.safetensors", tmp_path / "model").exit_code == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card and "NVIDIA's" in card and "latents of stabilityai/sd-vae-ft-mse" in card
    # A network of our own is not NVIDIA's, whatever its name.
    save_network(tmp_path / "edm2-img64-mine.pkl", tiny_network(), StandardRGBEncoder(), {"license": "mit"})
    assert run_cli(snapshot_tool, "export", tmp_path / "edm2-img64-mine.pkl", tmp_path / "mine").exit_code == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "license: mit" in card and "NVIDIA" not in card
    save_network(tmp_path / "edm2-img64-mine.pkl", tiny_network(), StandardRGBEncoder(), {})
    fails_with(
        run_cli(snapshot_tool, "export", tmp_path / "edm2-img64-mine.pkl", tmp_path / "m"), "under which licence?"
    )


def test_folders_that_are_no_snapshots(run, tmp_path):
    fails_with(run_cli(snapshot_tool, "inspect", tmp_path), "a folder without config.json is no snapshot")
    source = run / "network-snapshot-0000003-0.100.safetensors"
    fails_with(run_cli(snapshot_tool, "export", source, run, "--license=mit"), "holds other files")
    folder = tmp_path / "model"
    assert run_cli(snapshot_tool, "export", source, folder, "--license=mit").exit_code == 0
    for text, message in [
        ("{", "not JSON"),
        ("[]", "config.json: its description is not that"),
        ('{"architecture": 1}', "format version"),
    ]:
        (folder / "config.json").write_text(text)
        fails_with(run_cli(snapshot_tool, "inspect", folder), message)


# ---------------------------------------------------------------------------------------------------------
# reconstruct_phema.py


def test_all_reconstruction_options(run, tmp_path):
    args = [
        f"--indir={run}", "--inprefix=network-snapshot", "--instd=0.05,0.1", f"--outdir={tmp_path}", "--outprefix=posthoc",
        "--outstd=0.05,0.10,...,0.20", "--outkimg=2", "--skip", "--batch=2", "--format=safetensors",
    ]  # fmt: skip
    result = run_cli(reconstruct, *args)
    assert result.exit_code == 0, result.output
    assert_all_options(reconstruct, args)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"posthoc-0000002-0.{std}.safetensors" for std in ("050", "100", "150", "200")
    ]
    metadata = load_network(tmp_path / "posthoc-0000002-0.150.safetensors").metadata
    assert metadata["ema_std"] == 0.15
    assert metadata["nimg"] == 2048
    # Skipped when there.
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    run_cli(reconstruct, *args)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == times


@pytest.mark.parametrize("kimg", [2, 3])
def test_tracked_width_is_reproduced(run, tmp_path, kimg):
    run_cli(reconstruct, f"--indir={run}", f"--outdir={tmp_path}", "--outstd=0.05,0.1", f"--outkimg={kimg}")
    for std in ("0.050", "0.100"):
        made, stored = (
            load_network(d / f"{p}-{kimg:07d}-{std}.safetensors").net
            for d, p in [(tmp_path, "phema"), (run, "network-snapshot")]
        )
        for name, tensor in stored.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], tensor, rtol=2**-10, atol=2**-14)


def test_batch_of_outputs_does_not_matter(run, tmp_path):
    for batch in (1, 8):
        run_cli(
            reconstruct, f"--indir={run}", f"--outdir={tmp_path / str(batch)}", "--outstd=0.03,0.15", f"--batch={batch}"
        )
    for std in ("0.030", "0.150"):
        a, b = (load_network(tmp_path / batch / f"phema-0000003-{std}.safetensors").net.state_dict() for batch in "18")
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=2**-10, atol=2**-14)


@pytest.mark.parametrize("preadv", [True, False])
def test_reconstruction_from_snapshots_of_several_kinds(run, tmp_path, monkeypatch, preadv):
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    for name, suffix, dtype in [("0000001-0.050", ".safetensors", "fp32"), ("0000002-0.100", ".pkl", "fp16")]:
        old = mixed / f"network-snapshot-{name}.safetensors"
        old.unlink()
        source = run / old.name
        result = run_cli(snapshot_tool, "convert", source, old.with_suffix(suffix), f"--dtype={dtype}")
        assert result.exit_code == 0, result.output
    if not preadv:  # as on Windows
        monkeypatch.delattr(os, "preadv")
    made = []
    for indir in (run, mixed):
        outdir = tmp_path / f"of-{indir.name}"
        result = run_cli(reconstruct, f"--indir={indir}", f"--outdir={outdir}", "--outstd=0.07", "--format=safetensors")
        assert result.exit_code == 0, result.output
        made.append(load_network(outdir / "phema-0000003-0.070.safetensors").net.state_dict())
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=2**-10, atol=2**-14)


def test_snapshot_that_becomes_shorter(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    inputs = list_averages(tmp_path / "run", "network-snapshot")
    with open(inputs[1].path, "r+b") as f:
        f.truncate(inputs[1].path.stat().st_size - 100)
    with pytest.raises(UserError, match="cannot be read.*copy it again"):
        reconstruct_phema(inputs, tmp_path / "out", "phema", [0.07])
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--outstd=0.5"], ["--outstd", "between 0.001 and 0.289"]),
        (["--outstd=0.1,0.2,...,0.25"], ["--outstd", "even steps"]),
        (["--outstd=0.1,0.1001"], ["two widths share a file name"]),
        (["--outstd=0.1", "--outkimg=7"], ["--outkimg=7: there is no snapshot of that time (there are 1, 2, 3)"]),
        (["--outstd=0.1", "--instd=0.07"], ["--instd: no snapshots of width 0.070", "(there are 0.050, 0.100)"]),
        (["--outstd=0.1", "--inprefix=bogus"], ["no snapshots named bogus-"]),
        (["--outstd=0.1", "--outprefix=network-snapshot"], ["results in --indir need another prefix"]),
        (["--outstd=0.1", "--indir=nowhere"], ["--indir=nowhere: no such directory"]),
        ([], ["--outstd"]),
    ],
)
def test_bad_reconstruction_options(run, options, fragments):
    before = set(run.iterdir())
    fails_with(run_cli(reconstruct, f"--indir={run}", *options), *fragments)
    assert set(run.iterdir()) == before


def test_reconstruction_overwrites_nothing_but_reconstructions(run, tmp_path):
    for name in ("0000003-0.050", "0000003-0.100"):
        shutil.copy(run / f"network-snapshot-{name}.safetensors", tmp_path)
    args = [f"--indir={run}", f"--outdir={tmp_path}", "--instd=0.05", "--outstd=0.1"]
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    fails_with(
        run_cli(reconstruct, *args, "--outprefix=network-snapshot"),
        "network-snapshot-0000003-0.100.safetensors exists and is no reconstruction",
    )
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    for _again in range(2):
        assert run_cli(reconstruct, *args).exit_code == 0


def test_snapshots_of_two_runs(run, tmp_path):
    shutil.copy(run / "network-snapshot-0000003-0.050.safetensors", tmp_path)
    save_network(
        tmp_path / "network-snapshot-0000001-0.050.safetensors",
        tiny_network(),
        StandardRGBEncoder(),
        {"nimg": 1024, "ema_std": 0.05},
    )
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.1"), "holds another network")
    save_network(tmp_path / "network-snapshot-0000001-0.050.safetensors", tiny_network(), StandardRGBEncoder(), {})
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.1"), "does not say its training time")
    shutil.copy(
        run / "network-snapshot-0000003-0.050.safetensors", tmp_path / "network-snapshot-0000001-0.050.safetensors"
    )
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.1"), "are of the same time and width")
