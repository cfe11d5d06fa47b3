"""Sweeps over EMA widths and options of generation."""

import json
import math
import re
from pathlib import Path

import PIL.Image
import pytest
from conftest import DIGITS, assert_all_options, fails_with, run_cli, torchrun

from calculate_metrics import main as metrics_tool
from generate_images import main as generate
from training.config.edm2 import GenerationPreset
from training.guides import load_image_network
from training.sweep import Axis, by_coordinates, by_golden_section, grid, is_better_larger

SMALL = ["--ref", DIGITS, "--metrics=fd_pixels,prdc_pixels", "--num=200", "--steps=3", "--batch=100", "--device=cpu"]

QUICK = ["--metrics=fd_pixels", "--num=50", "--steps=2"]


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
    (text,) = re.findall(r'^    presets\["NAME"\] = (GenerationPreset\(.*\))$', output, re.MULTILINE)
    preset = eval(text, {"GenerationPreset": GenerationPreset})
    assert f"--net={preset.net}" in command.split() and preset.gnet is None and preset.guidance == 1
    assert preset.metric == "fd_pixels" and preset.value == pytest.approx(best, rel=1e-3)
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


def test_other_values_in_the_same_folder(run, digits_ref, tmp_path):
    """What earlier starts have measured counts for the best, and stands in the table and the picture."""
    args = [f"--net={run}", *QUICK, f"--ref={digits_ref}"]
    golden = ["--search=golden", "--tolerance=0.5", "--vary=rho=5,7"]
    assert sweep(tmp_path, *args, *golden, "--vary=sampler=heun,euler").exit_code == 0
    result = sweep(tmp_path, *args, *golden, "--vary=sampler=dpmpp-2m,euler")
    assert result.exit_code == 0 and {row["setting"]["sampler"] for row in records(tmp_path)[1:]} == {
        "heun", "euler", "dpmpp-2m",
    }  # fmt: skip
    fails_with(sweep(tmp_path, *args, "--vary=rho=8,9", "--vary=sampler=heun", "--budget=10"), "--budget=10 is less")
    result = sweep(tmp_path, *args, "--vary=rho=8,9", "--vary=sampler=heun")
    assert result.exit_code == 0 and "[1 of 2] rho=8" in result.output and "[2 of 2] rho=9" in result.output


def test_the_end_of_a_range(run, digits_ref, tmp_path):
    """Only a search that has come to its end can say that it is there."""
    args = [f"--net={run}", "--vary=sigma_max=80,2000", *QUICK, f"--ref={digits_ref}", "--search=golden"]
    note = re.compile(r"^Note: sigma_max=\S+ is next to the end of its range", re.MULTILINE)
    result = sweep(tmp_path, *args, "--budget=100")
    assert "is used up" in result.output and "Note: sigma_max" not in result.output
    assert note.search(sweep(tmp_path, *args, "--tolerance=0.4").output)


def test_other_sweeps_are_refused(swept, run):
    outdir, _ = swept
    result = sweep(outdir, f"--net={run}", "--vary=ema-std=0.05,0.15", "--vary=rho=5,7", "--seed=1")
    fails_with(result, "sweep.jsonl is of another sweep: choose another --outdir")


def test_all_sweep_options(run, tmp_path):
    args = [
        f"--net={run}", "--vary=ema-std=0.05,0.10", "--vary=kimg=2,3", "--vary=steps=2", "--search=coordinate", "--budget=10000",
        f"--outdir={tmp_path}", f"--ref={DIGITS}", "--metrics=fd_pixels", "--num=200", "--seed=1", "--batch=100",
        "--resize=torch", "--keep-memory=1MB", "--keep-disk=1GB",
    ]  # fmt: skip
    result = run_cli(metrics_tool, "sweep", *args)
    assert result.exit_code == 0, result.output
    args.append("--tolerance=0.1")  # of another search, see below
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
        (["--vary=rho=5,7", "--tolerance=0.1"], ["--tolerance has no effect with --search=grid"]),
        (["--vary=rho=5,6,7", "--search=golden"], ["--search=golden: give the ends of a range, such as --vary=ema"]),
        (["--vary=steps=5,7", "--search=golden"], ["--search=golden: give the ends of a range"]),
        (["--vary=ema-std=0.05,0.1", "--keep-disk=much"], ["--keep-disk: 'much' is not a number of bytes"]),
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


@pytest.mark.parametrize(("std", "guidance"), [(0.03, 2.6), (0.2, 1.1), (0.021, 1.0)])
def test_golden_sections_find_the_bottom_of_a_bowl(std, guidance):
    axes = [Axis.parse("ema-std=0.02,0.25"), Axis.parse("sampler=heun,euler,dpm2"), Axis.parse("guidance=1,3")]
    measured = set()

    def bowl(setting):
        measured.add(tuple(setting.values()))
        u, v = math.log(float(setting["ema-std"]) / std), float(setting["guidance"]) - guidance
        return u**2 + v**2 + 0.5 * u * v + (setting["sampler"] != "euler")

    tried = list(by_golden_section(axes, bowl, 0.03))
    best = min(tried, key=bowl)
    assert abs(math.log(float(best["ema-std"]) / std)) < 0.06 * math.log(0.25 / 0.02)
    assert abs(float(best["guidance"]) - guidance) < 0.06 * 2 and best["sampler"] == "euler"
    assert measured <= {tuple(setting.values()) for setting in tried}  # what is asked for has been yielded before
    assert len(measured) < 45
    assert all(0.02 <= float(setting["ema-std"]) <= 0.25 and 1 <= float(setting["guidance"]) <= 3 for setting in tried)


def test_golden_search_on_a_run(run, digits_ref, tmp_path):
    args = [f"--net={run}", "--vary=ema-std=0.03,0.25", "--vary=sampler=heun,euler", *QUICK, f"--ref={digits_ref}"]
    args += ["--search=golden", "--tolerance=0.4"]
    result = sweep(tmp_path, *args)
    assert result.exit_code == 0, result.output
    rows = records(tmp_path)[1:]
    widths = [float(row["setting"]["ema-std"]) for row in rows]
    assert widths[0] == pytest.approx((0.03 * 0.25) ** 0.5, abs=1e-3) and 5 <= len(rows) <= 16
    best = min(rows, key=lambda row: row["results"]["fd_pixels"])
    net = f"net-0000003-{best['setting']['ema-std']}.safetensors"
    (command,) = re.findall(r"python generate_images.py (.*) --outdir=out", result.output)
    assert net in command and f"--sampler={best['setting']['sampler']}" in command
    assert re.search(r"^\[3\] ema-std=", result.output, re.MULTILINE)
    with PIL.Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size[0] > 1000
    # Nothing is measured twice, and it ends where it did.
    again = sweep(tmp_path, *args)
    assert not re.search(r"^\[\d+\] ", again.output, re.MULTILINE) and command in again.output


def test_settings_that_share_a_network_load_it_once(run, digits_ref, tmp_path, monkeypatch):
    loaded = []

    def load(path, *args):
        loaded.append(Path(path).name)
        return load_image_network(path, *args)

    monkeypatch.setattr("training.shelf.load_image_network", load)
    args = [f"--net={run}", "--vary=rho=5,7", "--vary=ema-std=0.05,0.1,0.15", *QUICK, f"--ref={digits_ref}"]
    assert sweep(tmp_path / "a", *args).exit_code == 0
    assert loaded == [f"net-0000003-0.{std}.safetensors" for std in ("050", "100", "150")]
    # Without room in memory, those of the picture are loaded again; without room on the disk, two networks are left.
    loaded.clear()
    (tmp_path / "b" / "networks").mkdir(parents=True)
    (tmp_path / "b" / "networks" / "net-0000001-0.200.safetensors").write_bytes(b"of an earlier start")
    assert sweep(tmp_path / "b", *args, "--keep-memory=1kB", "--keep-disk=1kB").exit_code == 0
    assert len(loaded) > 3 and len(list((tmp_path / "b" / "networks").iterdir())) == 2
    results = [[row["results"] for row in records(tmp_path / name)[1:]] for name in "ab"]
    assert results[0] == results[1]


def test_what_has_no_effect_is_not_measured(run, digits_ref, tmp_path):
    """The guide's width, where there is no guidance."""
    args = [
        f"--net={run}",
        f"--gnet={run}",
        "--vary=guide-std=0.05,0.1,0.15",
        "--vary=guidance=1,1.5",
        *QUICK,
        f"--ref={digits_ref}",
    ]
    result = sweep(tmp_path, *args, "--budget=200")
    assert result.exit_code == 0 and "is used up" not in result.output, result.output
    rows = records(tmp_path)[1:]
    without = [row["results"] for row in rows if row["setting"]["guidance"] == "1"]
    assert len(rows) == 6 and without[0] == without[1] == without[2]
    assert len({row["provenance"]["gnet_sha256"] for row in rows if "gnet_sha256" in row["provenance"]}) == 3


def test_metrics_that_the_reference_lacks(run, tmp_path):
    ref = tmp_path / "ref.safetensors"
    assert run_cli(metrics_tool, "ref", f"--data={DIGITS}", f"--dest={ref}", "--metrics=fd_pixels").exit_code == 0
    args = ["sweep", f"--net={run}", "--vary=rho=5,7", f"--outdir={tmp_path / 'out'}", f"--ref={ref}", "--num=50"]
    fails_with(run_cli(metrics_tool, *args, "--metrics=fd_pixels,prdc_pixels"), "no features for prdc_pixels: make one")
    assert not (tmp_path / "out" / "sweep.jsonl").exists()


def test_which_way_is_better():
    assert [is_better_larger(name) for name in ("fid", "fd_pixels", "kid", "is", "precision_pixels", "recall")] == [
        False, False, False, True, True, True,
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes(run, tmp_path):
    args = [f"--net={run}", "--vary=ema-std=0.05,0.10,0.15", f"--ref={DIGITS}", "--metrics=fd_pixels", "--steps=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_cli(metrics_tool, "sweep", *args, "--num-images=100", f"--outdir={one}").exit_code == 0
    little = ["--keep-disk=1kB", "--keep-memory=1kB"]
    result = torchrun(2, "calculate_metrics.py", "sweep", *args, "--num-images=100", f"--outdir={two}", *little)
    assert result.returncode == 0, result.stderr
    for a, b in zip(records(one)[1:], records(two)[1:], strict=True):
        assert a["results"]["fd_pixels"] == pytest.approx(b["results"]["fd_pixels"], rel=1e-4)
