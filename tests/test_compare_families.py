"""The comparison of all families."""

import importlib
import json

import pytest
from conftest import DIGITS, run_cli

from scripts import compare_families
from scripts.compare_families import FAMILIES, SNAPSHOTS, main, table, whole


@pytest.mark.parametrize("key", FAMILIES)
def test_each_family_is_trained_as_its_command_allows(key, tmp_path):
    family, duration = FAMILIES[key], whole(10_000, 256 * SNAPSHOTS)
    command = importlib.import_module(family.script.removesuffix(".py")).main
    options = [f"--data={DIGITS}", f"--preset={family.preset}", f"--duration={duration}", *family.schedule(duration)]
    result = run_cli(command, f"--outdir={tmp_path / 'run'}", *options, "--snapshot=1024", "-n")
    assert result.exit_code == 0, result.output


def result(bound: bool) -> dict:
    figures = {"fd_pixels": 0.123, "precision_pixels": 0.5, "recall_pixels": 0.75, "distance_ratio": 1.25}
    return {
        "family": "A", "bound": bound, "parameters": 170_000, "duration": 2048, "train_seconds": 100.4, "sample_seconds": 1.26,
        "ema_std": "0.100", "bits_per_dim": 2.5, "bits_per_dim_error": 0.02, "figures": figures,
    }  # fmt: skip


def test_bounds_are_named_and_classes_left_out_where_there_are_none():
    floor = {"fd_pixels": 0.1, "precision_pixels": 1.0, "recall_pixels": 0.9}
    lines = table([result(bound=True), result(bound=False)], floor).splitlines()
    assert lines[0].startswith("| family | parameters | images seen |") and len(lines) == 5
    assert lines[2] == "| A | 0.17 M | 2,048 | 100 | 1.3 | 0.100 | 0.12 | 0.50 | 0.75 | 1.25 |  | ≤ 2.50 ± 0.02 |"
    assert lines[3].endswith("| 2.50 ± 0.02 |") and "real digits" in lines[4]


@pytest.mark.slow
def test_the_whole_comparison(tmp_path, monkeypatch):
    for name, value in {"SAMPLES": 200, "STDS": ("0.060", "0.100"), "STEPS": (4, 18), "LIKELIHOODS": 5}.items():
        monkeypatch.setattr(compare_families, name, value)
    monkeypatch.setattr(compare_families, "METRICS", ("fd_pixels", "prdc_pixels"))
    args = ["--seconds=2", f"--outdir={tmp_path}"]
    first = run_cli(main, *args)
    assert first.exit_code == 0, first.output
    assert (tmp_path / "report.png").is_file() and (tmp_path / "report.md").read_text().count("\n") == 7
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert len(times) == 4 and all(json.loads(path.read_text())["by_cost"] for path in times)
    assert run_cli(main, *args).exit_code == 0  # nothing is done twice
    assert times == {path: path.stat().st_mtime_ns for path in times}
