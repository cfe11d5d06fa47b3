"""The picture of training runs."""

import json

import numpy as np
import PIL.Image
import pytest
from conftest import fails_with, run_cli

from scripts.plot_run import Run, main


@pytest.fixture
def runs(tmp_path):
    """What two runs have reported, one of them with a line that a power failure spoiled."""
    for name, lr in {"a": 0.1, "b": 0.2}.items():
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        stats = [{"nimg": n, "loss": 1 / n, "lr": lr, "images_per_second": 5.0, "time": 1.0} for n in (512, 1024)]
        (folder / "stats.jsonl").write_text("\n".join(map(json.dumps, stats)) + '\n{"nimg": 15\0\n')
        (folder / "training_options.json").write_text(json.dumps({"lr": lr, "batch": 4, "data": name}))
        metrics = {"val_loss": 2.0, "val_error_20": 0.3, "val_error_7.5": 0.2}
        for std in ("0.050", "0.100"):
            record = {"nimg": 1024, "net": f"network-snapshot-0000001-{std}.safetensors", "results": metrics}
            with open(folder / "metric-val_loss.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
    return [tmp_path / name / "run" for name in "ab"]


def test_what_is_drawn(runs):
    run = Run(runs[0], "a")
    assert set(run.curves) == {"training loss", "learning rate", "images per second", "loss on held-out images"}
    assert run.curves["training loss"] == {"": [(512, 1 / 512), (1024, 1 / 1024)]}
    assert run.curves["loss on held-out images"] == {"0.050": [(1024, 2.0)], "0.100": [(1024, 2.0)]}
    assert run.errors == [(7.5, 0.2), (20.0, 0.3)]


def test_picture(runs, tmp_path):
    result = run_cli(main, *runs, f"--out={tmp_path / 'compared.png'}")
    assert result.exit_code == 0 and "lr: 0.1, 0.2" in result.output and "batch" not in result.output
    with PIL.Image.open(tmp_path / "compared.png") as picture:
        assert "plot_run.py" in picture.info["Description"]
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert run_cli(main, runs[0], f"--out={tmp_path / 'one.png'}").exit_code == 0


def test_no_run(tmp_path):
    out = f"--out={tmp_path / 'x.png'}"
    fails_with(run_cli(main, tmp_path, out), "no run has reported anything there")
    (tmp_path / "stats.jsonl").touch()
    fails_with(run_cli(main, tmp_path, out), "no run has reported anything there")
    fails_with(run_cli(main, tmp_path, f"--out={tmp_path / 'x.pdf'}"), "x.pdf: is saved as PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["stats.jsonl"]


def diagnosis(nimg: int, loss: float) -> dict:
    levels = {"sigma": [0.1, 1.0, 10.0], "count": [100, 300, 2], "loss": [loss, 2 * loss, 9.0]}
    uncertainty = {"error": [1.0, 2.0, 3.0], "logvar": [0.0, 0.7, 1.0]}
    parts = {f"part{i}": {"gradient_norm": 0.1 * i, "weight_norm": 2.0, "activation": 1.0 + i} for i in range(3)}
    parts["table"] = {"gradient_norm": None, "weight_norm": 1.0}
    return {
        "nimg": nimg,
        "gradient_norm": 3.0,
        "weight_norm": 5.0,
        "loss_by_sigma": levels | uncertainty,
        "parts": parts,
    }


def test_diagnoses(runs, tmp_path):
    lines = [diagnosis(256 * k, loss=float(k)) for k in range(1, 11)]
    lines.append({"nimg": 300, "nonfinite": {"images": []}})
    (runs[0] / "diagnosis.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = Run(runs[0], "a")
    assert run.curves["norm of the gradients"][""] == [(256 * k, 3.0) for k in range(1, 11)]
    assert run.incidents == [300]
    segments = run.levels("loss")
    assert [nimg for nimg, _ in segments] == [512, 1024, 1536, 2048, 2560]
    assert segments[0][1] == [(0.1, 1.5), (1.0, 3.0)]  # of two records; too few images at sigma = 10
    assert run.of_parts("activation")["part2"][0] == (256, 3.0) and "table" not in run.of_parts("activation")
    assert set(run.of_parts("weight_norm")) == {"part0", "part1", "part2", "table"}
    for paths in ([runs[0]], runs):
        assert run_cli(main, *paths, f"--out={tmp_path / 'x.png'}").exit_code == 0
        with PIL.Image.open(tmp_path / "x.png") as picture:
            assert picture.size[1] > 1200  # four rows of panels, not two
