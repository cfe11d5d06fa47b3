"""scripts/optimize_schedule.py: from a network to levels that generate_images.py takes."""

import json

import optimize_schedule
import pytest
from conftest import fails_with, images_in, run_cli

from generate_images import main as generate


@pytest.mark.parametrize("solver", ["heun"])
def test_levels_that_a_search_has_found(snapshot_file, tmp_path, solver):
    args = [f"--net={snapshot_file}", f"--sampler={solver}", f"--outdir={tmp_path / 'levels'}", "--steps=2,3"]
    result = run_cli(optimize_schedule.main, *args, "--images=4", "--candidates=6", "--device=cpu")
    assert result.exit_code == 0, result.output
    levels = tmp_path / "levels" / f"{solver}-3.txt"
    numbers = [float(line) for line in levels.read_text().splitlines() if not line.startswith("#")]
    assert len(numbers) == 3 and numbers[0] == 80
    args = [f"--net={snapshot_file}", f"--sampler={solver}", "--seeds=0-1"]
    for name, options in {"found": [f"--sigmas={levels}"], "edm": ["--steps=3"]}.items():
        result = run_cli(generate, *args, f"--outdir={tmp_path / name}", *options)
        assert result.exit_code == 0, result.output
    found, edm = (images_in(tmp_path / name) for name in ("found", "edm"))
    assert any((found[name] != edm[name]).any() for name in found)
    facts = json.loads((tmp_path / "found" / "generation.json").read_text())["sampler"]
    assert facts["sigmas"] == pytest.approx(numbers) and facts["num_steps"] == 3 and "rho" not in facts


def test_impossible_searches(snapshot_file, tmp_path):
    args = [f"--net={snapshot_file}", f"--outdir={tmp_path / 'levels'}"]
    fails_with(
        run_cli(optimize_schedule.main, *args, "--steps=37"), "--steps: the levels are chosen from --candidates=36"
    )
    fails_with(
        run_cli(optimize_schedule.main, *args, "--guidance=2"), "--guidance=2 needs a guiding network: give --gnet"
    )
    fails_with(run_cli(optimize_schedule.main, *args, "--sampler=pc"), "--sampler", "pc")
    assert not (tmp_path / "levels").exists()
