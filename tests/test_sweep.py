"""Sweeps over EMA widths and options of generation."""

import json
import re
from pathlib import Path

import PIL.Image
import pytest
from conftest import DIGITS, assert_all_options, fails_with, run_cli, torchrun

from calculate_metrics import main as metrics_tool
from generate_images import main as generate
from training.sweep import Axis, by_coordinates, grid, is_better_larger

SMALL = ["--ref", DIGITS, "--metrics=fd_pixels,prdc_pixels", "--num=200", "--steps=3", "--batch=100", "--device=cpu"]


def sweep(outdir: Path, *args):
    return run_cli(metrics_tool, "sweep", f"--outdir={outdir}", *SMALL, *args)


def records(outdir: Path) -> list[dict]:
    return [json.loads(line) for line in (outdir / "sweep.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(run, tmp_path_factory):
    """The folder and the output of a sweep over four settings."""
    outdir = tmp_path_factory.mktemp("sweep")
    result = sweep(outdir, f"--net={run}", "--vary=ema-std=0.05,0.15", "--vary=rho=5,7")
    assert result.exit_code == 0, result.output
    return outdir, result.output


def test_results(swept, run, tmp_path):
    outdir, output = swept
    first, *rows = records(outdir)
    assert first["task"]["num_images"] == 200
    assert [row["setting"] for row in rows] == [
        {"ema-std": std, "rho": rho} for std in ("0.050", "0.150") for rho in ("5", "7")
    ]
    # What gen says of the same images.
    net = outdir / "networks" / "net-0000003-0.150.safetensors"
    result = run_cli(metrics_tool, "gen", f"--net={net}", "--rho=5", *SMALL, f"--outdir={tmp_path}")
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "metric-fd_pixels.jsonl").read_text())
    assert rows[2]["results"]["fd_pixels"] == pytest.approx(measured["results"]["fd_pixels"], rel=1e-5)
    assert rows[2]["provenance"]["net_sha256"] == measured["net_sha256"]
    # The best, and the command that makes its images.
    best = min(row["results"]["fd_pixels"] for row in rows)
    assert f"Best fd_pixels, {best:.5g}:" in output
    (command,) = re.findall(r"python generate_images.py (.*) --outdir=out", output)
    assert run_cli(generate, *command.split(), "--seeds=0-1", f"--outdir={tmp_path / 'images'}").exit_code == 0
    with PIL.Image.open(outdir / "sweep.png") as picture:
        assert picture.size[0] > 1000 and "sweep" in picture.info["Description"]


def test_nothing_is_measured_twice(swept, run):
    outdir, _ = swept
    before = (outdir / "sweep.jsonl").read_bytes()
    result = sweep(outdir, f"--net={run}", "--vary=ema-std=0.05,0.15", "--vary=rho=5,7")
    assert "of 4]" not in result.output and (outdir / "sweep.jsonl").read_bytes() == before
    # More values, within a budget of one setting, after a write that a power failure has cut off.
    with open(outdir / "sweep.jsonl", "a") as f:
        f.write('{"setting": {"ema-std": "0.0')
    result = sweep(outdir, f"--net={run}", "--vary=ema-std=0.05,0.10,0.15", "--vary=rho=5,7", "--budget=200")
    assert result.output.count("of 6]") == 1 and "--budget=200 is used up" in result.output


def test_other_sweeps_are_refused(swept, run):
    outdir, _ = swept
    result = sweep(outdir, f"--net={run}", "--vary=ema-std=0.05,0.15", "--vary=rho=5,7", "--seed=1")
    fails_with(result, "sweep.jsonl is of another sweep: choose another --outdir")


def test_all_sweep_options(run, tmp_path):
    args = [
        f"--net={run}", "--vary=ema-std=0.05,0.10", "--vary=kimg=2,3", "--vary=steps=2", "--search=coordinate", "--budget=10000",
        f"--outdir={tmp_path}", f"--ref={DIGITS}", "--metrics=fd_pixels", "--num=200", "--seed=1", "--batch=100",
        "--resize=torch",
    ]  # fmt: skip
    result = run_cli(metrics_tool, "sweep", *args)
    assert result.exit_code == 0, result.output
    assert_all_options(metrics_tool.commands["sweep"], args, but_those_of=metrics_tool.commands["gen"])
    assert {path.name[:11] for path in (tmp_path / "networks").iterdir()} == {"net-0000002", "net-0000003"}


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--vary=ema-std"], ["give a name and values"]),
        (["--vary=nonsense=1,2"], ["nonsense is neither an option of generate_images.py nor ema-std"]),
        (["--vary=guidance=1,1.0,1"], ["the same value twice"]),
        (["--vary=steps=2,3", "--vary=steps=4"], ["the same name twice"]),
        (["--vary=guide-std=0.05"], ["--vary=guide-std: needs --gnet=DIR"]),
        (["--vary=kimg=2,3"], ["vary ema-std, too"]),
        (["--vary=steps=0,3"], ["--steps"]),
        (["--vary=sampler=heun,magic"], ["magic"]),
        (["--vary=ema-std=0.5"], ["0.5"]),
        (["--vary=rho=5,7", "--budget=10"], ["--budget=10 is less than the 200 images of one setting"]),
    ],
)
def test_bad_input(run, tmp_path, args, fragments):
    fails_with(sweep(tmp_path, f"--net={run}", *args), *fragments)


def test_coordinates_find_the_bottom_of_a_bowl():
    axes = [Axis("x", tuple("01234")), Axis("y", tuple("0123456"))]

    def bowl(setting):
        return (int(setting["x"]) - 4) ** 2 + (int(setting["y"]) - 1) ** 2

    tried = list(by_coordinates(axes, bowl))
    assert min(tried, key=bowl) == {"x": "4", "y": "1"}
    different = {tuple(setting.values()) for setting in tried}
    assert len(different) < len(list(grid(axes))) / 2


def test_which_way_is_better():
    assert [is_better_larger(name) for name in ("fid", "fd_pixels", "kid", "is", "precision_pixels", "recall")] == [
        False, False, False, True, True, True,
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes(run, tmp_path):
    args = [f"--net={run}", "--vary=ema-std=0.05,0.15", f"--ref={DIGITS}", "--metrics=fd_pixels", "--steps=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_cli(metrics_tool, "sweep", *args, "--num-images=100", f"--outdir={one}").exit_code == 0
    result = torchrun(2, "calculate_metrics.py", "sweep", *args, "--num-images=100", f"--outdir={two}")
    assert result.returncode == 0, result.stderr
    for a, b in zip(records(one)[1:], records(two)[1:], strict=True):
        assert a["results"]["fd_pixels"] == pytest.approx(b["results"]["fd_pixels"], rel=1e-4)
