"""generate_images.py: every option, every preset, and bad input."""

import json
import shlex
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
from conftest import (
    ROOT,
    assert_all_options,
    fails_with,
    images_in,
    png,
    run_cli,
    tiny_network,
    torchrun,
)
from guidance_options import OPTIONS_OF_GUIDANCE

from dataset_tool import main as dataset_tool
from generate_images import main as generate
from training.config.edm2 import GENERATION_PRESETS, GenerationPreset
from training.config.samplers import SOLVERS
from training.conversion.opening import open_source
from training.dataset.images import ImageFolderDataset
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.snapshot import save_network

sys.path.insert(0, str(ROOT / "scripts"))


# Beside those that all have.
OPTIONS_OF_SOLVERS = {
    "pc": [
        "--predictor=ancestral_sampling", "--corrector=ald", "--n-steps-each=2", "--snr=0.1", "--noise-removal=0", "--probability-flow=0",
        "--corrector-norm=batch", "--schedule=vp", "--steps=40",
    ],
    "euler-maruyama": ["--stochastic=0", "--schedule=subvp", "--steps=4"],
    "consistency": ["--sigmas=5,1,0.3"],
    "rk45": ["--rtol=0.1", "--atol=0.1", "--common-norm=1", "--denoise=20"],
    "dpm-single": ["--order=2", "--prediction=noise", "--solver-type=taylor", "--fixed-order=1", "--spacing=log-snr", "--steps=4"],
    "unipc": ["--unipc-order=2", "--unipc-b=B1", "--unipc-prediction=noise", "--unipc-corrector=0", "--sigmas=10,1,0.1"],
    "dpm-adaptive": [
        "--adaptive-order=2", "--adaptive-prediction=data", "--adaptive-atol=0.1", "--adaptive-rtol=0.1", "--adaptive-first-step=0.1",
        "--adaptive-safety=0.8", "--adaptive-common-step=1", "--sigma_min=0.01",
    ],
}  # fmt: skip


@pytest.mark.parametrize("solver", OPTIONS_OF_SOLVERS)
def test_options_of_solvers(run, tmp_path, solver):
    net = run / "network-snapshot-0000003-0.100.safetensors"
    args = [f"--net={net}", "--seeds=0-1", f"--sampler={solver}"]
    for name, options in [("plain", []), ("changed", OPTIONS_OF_SOLVERS[solver])]:
        result = run_cli(generate, *args, f"--outdir={tmp_path / name}", *options)
        assert result.exit_code == 0, result.output
    plain, changed = images_in(tmp_path / "plain"), images_in(tmp_path / "changed")
    assert all((plain[name] != changed[name]).any() for name in plain)
    unused = next(option for option in OPTIONS_OF_SOLVERS["pc" if solver != "pc" else "rk45"])
    result = run_cli(generate, *args, f"--outdir={tmp_path / 'unused'}", unused)
    assert result.exit_code != 0 and f"has no effect with --sampler={solver}: leave it out" in result.output


def test_all_generation_options(run, tmp_path):
    net, gnet = (run / f"network-snapshot-{name}.safetensors" for name in ("0000003-0.100", "0000001-0.050"))
    args = [
        f"--net={net}", f"--gnet={gnet}", f"--outdir={tmp_path / 'out'}", "--subdirs", "--seeds=1,2,999-1001", "--class=3", "--class-policy=balanced",
        "--batch=2", "--sampler=euler", "--steps=4", "--sigma_min=0.01", "--sigma_max=40", "--rho=5", "--guidance=2", "--S_churn=5", "--S_min=0.1",
        "--S_max=10", "--S_noise=1.01", "--guidance-interval=0.1,5", "--precision=bf16", "--compile=1", "--device=cpu",
        f"--grid={tmp_path / 'grid.png'}", "--skip-existing", "--offline",
    ]  # fmt: skip
    (left := tmp_path / "out" / "000000" / ".000001.png.0123456789abcdef.tmp").parent.mkdir(parents=True)
    left.write_bytes(b"of a killed process")
    result = run_cli(generate, *args)
    assert result.exit_code == 0, result.output
    # The rest is tested below, or with networks that it is for.
    others = ["--temperature=1", "--readjust-bn=1", "--pixels=mean", "--encoder=x", "--trust-encoder=1", "--arch=x"]
    others += ["--prompt=x", "--prompts=x", "--text-encoder=x", "--classifier=x"]
    others += [option for options in OPTIONS_OF_SOLVERS.values() for option in options]
    others += [option for options in OPTIONS_OF_GUIDANCE.values() for option in options]
    assert_all_options(generate, [*args, *others, "--preset=x", "--print-config", "--list-presets"])
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
    without_steps = option in ("--sampler=dpm-adaptive", "--sampler=rk45", "--sampler=consistency")
    for name, extra in [("plain", ["--steps=4"]), ("changed", [option] if without_steps else ["--steps=4", option])]:
        run_cli(generate, f"--net={net}", f"--gnet={gnet}", f"--outdir={tmp_path / name}", "--seeds=7", *extra)
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
    assert json.loads((tmp_path / "d" / "generation.json").read_text())["seeds"] == "0-6"
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
        (["--seeds=0,4294967296"], ["--seeds", "seed 4294967296 is too large: seeds are less than 2^32"]),
        (["--class=10"], ["--class=10 is out of range: the classes are 0 to 9"]),
        (["--class=-1"], ["--class=-1 is out of range"]),
        (["--guidance=2"], ["--guidance=2 needs a guiding network: give --gnet"]),
        (["--guidance-interval=2,1"], ["--guidance-interval", "LO must be less than HI"]),
        (["--guidance-interval=a"], ["--guidance-interval", "is not of the form LO,HI"]),
        (["--guidance-ramp=1,2"], ["--guidance-ramp has no effect with --guidance-schedule=constant: leave it out"]),
        (["--guidance-table=nowhere"], ["--guidance-table: nowhere: no such file"]),
        (["--guidance=2", "--apg-eta=0"], ["--apg-eta has no effect with --guidance-method=cfg: leave it out"]),
        (["--guidance-method=cfg++"], ["--guidance-method=cfg++ is a rule for steps of Euler's method"]),
        (["--guidance-method=cfg++", "--sampler=euler"], ["needs a guiding network: give --gnet"]),
        (["--sigmas=1,2"], ["--sigmas=1.0,2.0: noise levels must fall from each to the next"]),
        (["--sigmas=nowhere"], ["--sigmas: nowhere: no such file"]),
        (["--sigmas=2,1", "--rho=7"], ["--rho has no effect with --sampler=heun and --sigmas: leave it out"]),
        (["--sigmas=2,1", "--sampler=pc"], ["--sigmas: pc takes no list of noise levels: use one of heun, euler"]),
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
        (dict(label_dim=7), "--gnet follows 7 classes, but --net follows 10 classes"),
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


def test_grid_overwrites_nothing(snapshot_file, tmp_path):
    before = snapshot_file.read_bytes()
    args = [f"--net={snapshot_file}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=1"]
    (tmp_path / "link.png").symlink_to(snapshot_file)
    for name, fragment in {
        snapshot_file.name: f"is the same as --net={snapshot_file}",
        "link.png": f"is the same as --net={snapshot_file}",
        "grid.jpg": "is saved as PNG: choose a name that ends in .png",
        "out/000000.png": "is also the image of a seed",
    }.items():
        fails_with(run_cli(generate, *args, f"--grid={tmp_path / name}"), f"--grid={tmp_path / name}: {fragment}")
    assert snapshot_file.read_bytes() == before and not (tmp_path / "out").exists()


def test_a_grid_among_the_images_is_none_of_them(snapshot_file, tmp_path):
    out = tmp_path / "out"
    args = [f"--net={snapshot_file}", f"--outdir={out}", "--seeds=0-2", "--steps=2"]
    assert run_cli(generate, *args, f"--grid={out / 'all.png'}").exit_code == 0
    assert run_cli(generate, *args, "--skip-existing").exit_code == 0  # keeps in mind what is none
    dataset = ImageFolderDataset(out)
    assert len(dataset) == 3 and "left out: 1 contact sheet (all.png)" in dataset.notes
    result = run_cli(dataset_tool, "convert", f"--source={out}", f"--dest={tmp_path / 'a.zip'}", "--workers=1")
    assert f"{tmp_path / 'a.zip'}: 3 images" in result.output, result.output
    shutil.make_archive(str(tmp_path / "b"), "zip", out)
    assert len(ImageFolderDataset(tmp_path / "b.zip")) == 3
    assert [image.name for image in open_source(tmp_path / "b.zip").images()] == [f"00000{i}.png" for i in range(3)]
    fails_with(run_cli(generate, *args, f"--grid={out / '000007.png'}"), "is the name of an image of --outdir")


def test_grid_of_images_of_two_networks(snapshot_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000001.png").write_bytes(png(np.zeros([9, 9], np.uint8)))
    (tmp_path / "out" / "000002.png").write_bytes(png(np.zeros([9, 9], np.uint8))[:-20])  # cut off: made again
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
    damaged = bytearray(png(np.zeros([9, 9], np.uint8)))
    damaged[45] ^= 0xFF
    (tmp_path / "out" / "000001.png").write_bytes(damaged)
    fails_with(run_cli(generate, *args), "--grid: ", "000001.png: damaged", "delete it, and repeat the command")


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


def test_only_print_config_needs_no_outdir():
    printed = run_cli(generate, "--preset=edm2-img512-xs-fid", "--print-config")
    assert printed.exit_code == 0 and "--outdir" not in printed.output
    fails_with(run_cli(generate, "--preset=edm2-img512-xs-fid"), "Missing option '--outdir'.", "--help")


def test_which_network(tmp_path):
    fails_with(run_cli(generate, f"--outdir={tmp_path}"), "Give --net or --preset")
    fails_with(
        run_cli(generate, f"--outdir={tmp_path}", "--preset=edm2-img512-xxs"), "unknown preset", "edm2-img512-xs-fid"
    )
