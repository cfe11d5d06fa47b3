"""edit_images.py restore: every task, method and family of networks, and bad input."""

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DIGITS, fails_with, images_in, make_dataset, png, run_cli, tiny_network

from dnnlib.files import file_sha256
from edit_images import main as edit
from training.conditioning import DataSpec
from training.config.restoration import METHODS
from training.config.samplers import SOLVERS
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.uvit_presets import UVIT_PRESETS
from training.dataset.images import ImageFolderDataset
from training.editing.restoring import measure, operator_for, psnr
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.restoration.operators import AveragePool, Blur, Mask, gaussian_kernel
from training.snapshot import save_network

TASKS = {
    "super-resolution": ["--task=super-resolution"],
    "deblur": ["--task=deblur", "--blur=box", "--blur-width=2"],
    "mask": ["--task=mask", "--ratio=0.5"],
}
FAST = ["--sampler=euler", "--steps=3"]


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A snapshot of a small network of each family of denoisers."""
    folder, paths = tmp_path_factory.mktemp("nets"), {}
    made = {"edm2": tiny_network()}
    for name, preset in {
        "ve": SCORE_PRESETS["digits-ve"],
        "vp": SCORE_PRESETS["digits-vp"],
        "uvit": UVIT_PRESETS["digits-uvit"],
    }.items():
        torch.manual_seed(0)
        made[name] = preset_network(preset)
    for name, net in made.items():
        paths[name] = folder / f"{name}.safetensors"
        save_network(paths[name], net, StandardRGBEncoder(*net.spec.pixel_range), {}, torch.float32)
    return paths


def restored(folder) -> dict[str, np.ndarray]:
    return {name: image.astype(int) for name, image in images_in(folder).items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_tasks_and_methods(nets, tmp_path, task, method):
    """Files and sheet as of the other commands; an image depends on its seed alone."""
    args = [f"--net={nets['edm2']}", f"--data={DIGITS}", *TASKS[task], f"--method={method}", *FAST, "--seed=3"]
    sheet = tmp_path / "sheet.png"
    result = run_cli(
        edit, "restore", *args, "--indices=3,5", "--fills=2", f"--outdir={tmp_path / 'out'}", f"--sheet={sheet}"
    )
    assert result.exit_code == 0, result.output
    assert "Known: " in result.output and "PSNR in dB: known " in result.output
    found = restored(tmp_path / "out")
    assert sorted(found) == [f"{i:06d}-{k:02d}.png" for i in (3, 5) for k in range(2)]
    assert (found["000003-00.png"] != found["000003-01.png"]).any()
    with PIL.Image.open(sheet) as picture:
        assert picture.size[0] == 4 * 72 - 8
    result = run_cli(edit, "restore", *args, "--indices=5", "--fills=2", "--batch=1", f"--outdir={tmp_path / 'one'}")
    assert result.exit_code == 0, result.output
    alone = restored(tmp_path / "one")
    assert len(alone) == 2 and all(np.abs(alone[name] - found[name]).max() <= 1 for name in alone)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            [
                "--task=deblur",
                "--blur=motion",
                "--blur-width=3",
                "--blur-angle=45",
                "--method=diffpir",
                "--diffpir-weight=4",
            ],
            "motion over 3 pixels at 45 degrees, with noise 0.05 of the range of pixels; DiffPIR (lambda 4)",
        ),
        (
            ["--task=deblur", "--blur-width=0.5", "--noise=0.2", "--method=dps", "--dps-step=1"],
            "a Gaussian blur with a standard deviation of 0.5 pixels, with noise 0.2 of the range of pixels; DPS (zeta 1)",
        ),
        (
            ["--task=super-resolution", "--factor=4", "--prior-std=0.3"],
            "means of 4x4 pixels, with noise 0.05 of the range of pixels; PiGDM (prior std 0.3)",
        ),
        (["--task=mask", "--box=2,2,6,6"], "some pixels, with noise 0.05"),
        (["--task=mask", "--mask=MASK"], "some pixels, with noise 0.05"),
    ],
)
def test_options_say_what_they_do(nets, tmp_path, options, line):
    PIL.Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    options = [option.replace("MASK", str(tmp_path / "mask.png")) for option in options]
    args = [f"--net={nets['edm2']}", f"--data={DIGITS}", "--indices=1", "--fills=1", *options, *FAST]
    result = run_cli(edit, "restore", *args, f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0, result.output
    assert f"Known: {line}" in result.output and len(restored(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["ve", "vp", "uvit"])
def test_families(nets, tmp_path, name):
    """All can be differentiated, and in the units of their pixels: without noise, what is known is met."""
    args = [f"--net={nets[name]}", f"--data={DIGITS}", "--indices=0-3", "--fills=1", "--noise=0", *FAST]
    result = run_cli(edit, "restore", *args, *TASKS["mask"], f"--outdir={tmp_path / 'pigdm'}")
    assert result.exit_code == 0, result.output
    assert len(restored(tmp_path / "pigdm")) == 4
    result = run_cli(
        edit, "restore", *args, *TASKS["super-resolution"], "--method=diffpir", f"--outdir={tmp_path / 'x'}"
    )
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(DIGITS, use_labels=False)
    for i in range(4):
        cells = [
            x.astype(float).reshape(4, 2, 4, 2).mean(axis=(1, 3))
            for x in (dataset[i][0][0], restored(tmp_path / "x")[f"{i:06d}-00.png"])
        ]
        inside = ~((restored(tmp_path / "x")[f"{i:06d}-00.png"].reshape(4, 2, 4, 2) % 255 == 0).any(axis=(1, 3)))
        assert np.abs(cells[0] - cells[1])[inside].max(initial=0) <= 1  # what is not cut to the range of pixels


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(nets, tmp_path, solver):
    args = [f"--net={nets['edm2']}", f"--data={DIGITS}", "--indices=1", "--fills=1", *TASKS["deblur"]]
    few = {
        "rk45": ["--rtol=0.5", "--atol=0.5"],
        "dpm-adaptive": ["--adaptive-rtol=2", "--adaptive-atol=0.1"],
        "consistency": [],  # has levels of its own
    }
    options = few.get(solver, ["--steps=12"])
    result = run_cli(edit, "restore", *args, *options, f"--sampler={solver}", f"--outdir={tmp_path}")
    assert result.exit_code == 0, result.output
    assert restored(tmp_path)["000001-00.png"].std() > 0


@pytest.mark.parametrize(
    "rule", [[], ["--guidance-method=apg", "--apg-momentum=-0.5"], ["--guidance-method=cfg-zero"]], ids=str
)
def test_with_guidance(nets, tmp_path, rule):
    """The guided denoiser is restored with, not the network alone, whatever the rule remembers of earlier steps."""
    args = [f"--net={nets['edm2']}", f"--data={DIGITS}", "--indices=1", "--fills=1", *TASKS["mask"], *FAST]
    for name, options in {"plain": [], "guided": [f"--gnet={nets['vp']}", "--guidance=3", *rule]}.items():
        result = run_cli(edit, "restore", *args, *options, f"--outdir={tmp_path / name}")
        assert result.exit_code == 0, result.output
    assert (restored(tmp_path / "plain")["000001-00.png"] != restored(tmp_path / "guided")["000001-00.png"]).any()


def test_noise_of_measurements():
    """It has the size that was asked for, is another one for each image, and is the same whatever images are beside."""
    operator = Mask((torch.arange(64).reshape(1, 1, 8, 8) % 2).float())
    x = torch.zeros(400, 1, 8, 8)
    y = measure(operator, x, 0.3, list(range(400)), seed=1)
    seen = y[:, :, :, 1::2]
    assert seen.std().item() == pytest.approx(0.3, rel=0.02) and (y[:, :, :, ::2] == 0).all()
    assert (measure(operator, x[:1], 0.3, [7], seed=1)[0] == y[7]).all()
    assert (measure(operator, x[:1], 0.3, [7], seed=2)[0] != y[7]).any() and (y[0] != y[1]).any()


def test_record(nets, tmp_path):
    """What made the results, and how good they are: beside them."""
    args = [f"--net={nets['edm2']}", f"--data={DIGITS}", "--indices=3,5-6", "--fills=2", "--seed=4", *FAST]
    options = ["--task=deblur", "--blur=box", "--blur-width=2", "--method=dps", "--dps-step=1"]
    result = run_cli(edit, "restore", *args, *options, f"--outdir={tmp_path}")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "edit.json").read_text())
    wanted = {"edit": "restore", "data": str(DIGITS), "indices": "3,5-6", "fills": 2, "seed": 4}
    wanted |= {"task": "deblur", "blur": "box", "blur_width": 2.0, "noise": 0.05, "method": "dps", "dps_step": 1.0}
    wanted |= {"degraded": False, "labels": "those of the images", "net_sha256": file_sha256(nets["edm2"])}
    assert wanted.items() <= record.items()
    assert not {"factor", "prior_std", "diffpir_weight", "blur_angle", "mask", "box", "ratio"} & set(record)
    assert record["sampler"]["solver"] == "euler" and record["sampler"]["num_steps"] == 3
    found = re.search(r"known ([\d.]+), restored ([\d.]+), their means ([\d.]+)", result.output)
    assert found
    names = ("PSNR of known", "PSNR of restored", "PSNR of their means")
    assert [f"{record['results'][name]:.2f}" for name in names] == list(found.groups())
    assert f"differ from what is known by {record['results']['residual']:.3g} of" in result.output


@pytest.mark.parametrize("task", TASKS)
def test_damaged_images(nets, tmp_path, task):
    """Images that something else has damaged are restored as those that the command damages itself."""
    options, damage = {
        "super-resolution": (TASKS[task], AveragePool(2)),
        "deblur": (["--task=deblur", "--blur-width=0.5"], Blur(gaussian_kernel(0.5), (8, 8))),  # can be undone
        "mask": (["--task=mask", "--box=2,2,6,6"], Mask(torch.ones(8, 8))),
    }[task]
    data, files = ImageFolderDataset(DIGITS), {}
    for i in range(3):
        pixels = damage(torch.from_numpy(data[i][0]).float()[None])[0, 0].round().byte().numpy()
        if task == "mask":
            pixels[2:6, 2:6] = 255  # what is hidden counts for nothing
        files[f"00000/{i}.png"] = png(pixels)
    labels = {name: data.get_stored_label(i) for i, name in enumerate(files)}
    labels["00000/last.png"] = 9  # as many classes as the network knows
    files["00000/last.png"] = files["00000/0.png"]
    damaged = make_dataset(tmp_path / "damaged.zip", files, labels)
    common = [f"--net={nets['edm2']}", "--indices=0-2", "--fills=1", "--noise=0", "--method=diffpir", *options, *FAST]
    sheet = tmp_path / "sheet.png"
    result = run_cli(
        edit, "restore", *common, f"--data={damaged}", "--degraded=1", f"--outdir={tmp_path / 'a'}", f"--sheet={sheet}"
    )
    assert result.exit_code == 0, result.output
    assert "PSNR" not in result.output and "Residual: " in result.output
    with PIL.Image.open(sheet) as picture:
        assert picture.size[0] == 2 * 72 - 8  # what is known, and one restored image
    result = run_cli(edit, "restore", *common, f"--data={DIGITS}", f"--outdir={tmp_path / 'b'}")
    assert result.exit_code == 0, result.output
    ours, theirs = restored(tmp_path / "a"), restored(tmp_path / "b")
    # Pixels of files are whole numbers, whose rounding undoing a blur makes more of.
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) <= 4
    record = json.loads((tmp_path / "a" / "edit.json").read_text())
    assert record["degraded"] is True and set(record["results"]) == {"residual"}


def test_damaged_images_of_another_size(nets, tmp_path):
    args = [f"--net={nets['edm2']}", f"--data={DIGITS}", "--degraded=1", f"--outdir={tmp_path / 'out'}"]
    line = "but the network knows 8x8 with 1 and is to make images of 4x4 larger"
    fails_with(run_cli(edit, "restore", *args, "--task=super-resolution"), line)
    fails_with(run_cli(edit, "restore", *args, "--task=mask", "--ratio=0.5"), "with --degraded=1, give --mask or --box")


def test_psnr():
    a = torch.zeros(2, 4)
    assert psnr(a, a) == float("inf")
    assert psnr(a, a + 25.5) == pytest.approx(20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "what is to be undone? Give --task=super-resolution|deblur|mask"),
        (["--task=mask"], "Give one of --mask, --box and --ratio"),
        (["--task=mask", "--box=1,2,3"], "four numbers LEFT,TOP,RIGHT,BOTTOM, not 3"),
        (["--task=deblur", "--factor=2"], "--factor has no effect with --task=deblur"),
        (["--task=deblur", "--ratio=0.5"], "--ratio has no effect with --task=deblur"),
        (["--task=super-resolution", "--blur-width=2"], "--blur-width has no effect with --task=super-resolution"),
        (["--task=deblur", "--blur-angle=30"], "--blur-angle has no effect without --blur=motion"),
        (["--task=deblur", "--blur=box", "--blur-width=2.5"], "a box is a whole number of pixels wide"),
        (["--task=deblur", "--method=dps", "--prior-std=1"], "--prior-std has no effect with --method=dps"),
        (["--task=super-resolution", "--factor=3"], "images of 8x8 cannot be divided into cells of 3x3"),
        (["--task=mask", "--mask=nowhere.png"], "nowhere.png: cannot be read as a picture"),
        (["--task=deblur", "--noise=-1"], "--noise must be at least 0, not -1"),
    ],
)
def test_bad_input(nets, tmp_path, options, message):
    args = [f"--net={nets['vp']}", f"--data={DIGITS}", f"--outdir={tmp_path / 'out'}", *options]
    fails_with(run_cli(edit, "restore", *args), message)
    assert not (tmp_path / "out").exists()


def test_operators_of_options():
    """The default of each task is one that works at the size of the digits."""
    from training.config.restoration import RestorationConfig

    x = torch.rand(1, *DataSpec(channels=1, resolution=8).shape)
    assert operator_for(RestorationConfig(task="super-resolution"), None, 8)(x).shape == (1, 1, 4, 4)
    for blur in ("gaussian", "box", "motion"):
        blurred = operator_for(RestorationConfig(task="deblur", blur=blur), None, 8)(x)
        assert blurred.mean().item() == pytest.approx(x.mean().item(), rel=1e-5) and blurred.std() < x.std()
