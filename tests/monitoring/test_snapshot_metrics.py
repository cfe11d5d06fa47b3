"""Metrics of the snapshots of a training run."""

import json

import pytest
import torch
from conftest import DIGITS, TINY, fails_with, make_dataset, random_images, run_cli, torchrun
from measuring import records_in, records_of, sha256, tool

from train_edm2 import main as train


def test_metrics_of_snapshots(digits_ref, tmp_path):
    options = [*TINY, f"--data={DIGITS}", "--metrics=fd_pixels", f"--metrics-ref={digits_ref}", "--metrics-num=10"]
    run = tmp_path / "run"
    assert run_cli(train, f"--outdir={run}", *options).exit_code == 0
    records = records_in(run / "metric-fd_pixels.jsonl")
    assert [record["net"] for record in records] == [path.name for path in sorted(run.glob("*.safetensors"))]
    assert [record["nimg"] for record in records] == [1024, 1024]
    log = (run / "log.txt").read_text()
    for record in records:
        snapshot = run / record["net"]
        assert record["net_sha256"] == sha256(snapshot)
        assert f"EMA-{snapshot.stem[-5:]} at 1024 images: fd_pixels {record['results']['fd_pixels']:.6g}" in log
        gen = tool("gen", f"--net={snapshot}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=10")
        (again,) = records_of(gen.output)
        assert again["results"] == record["results"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    (event,) = events.Scalars("fd_pixels/EMA-0.050")
    assert event.step == 1024 and event.value == pytest.approx(records[0]["results"]["fd_pixels"])


def test_two_processes_measure_snapshots(digits_ref, tmp_path):
    options = [*TINY, f"--data={DIGITS}", "--metrics=fd_pixels", f"--metrics-ref={digits_ref}", "--metrics-num=11"]
    done = torchrun(2, "train_edm2.py", f"--outdir={tmp_path}", *options)
    assert done.returncode == 0, done.stderr
    records = records_in(tmp_path / "metric-fd_pixels.jsonl")
    assert [record["num_images"] for record in records] == [11, 11]
    gen = tool("gen", f"--net={tmp_path / records[1]['net']}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=11")
    (again,) = records_of(gen.output)
    assert again["results"]["fd_pixels"] == pytest.approx(records[1]["results"]["fd_pixels"], rel=1e-5)


def test_metrics_do_not_disturb_training(digits_ref, tmp_path):
    metrics = ["--metrics=fd_pixels", f"--metrics-ref={digits_ref}", "--metrics-num=4"]
    for name, options in {"plain": [], "measured": metrics}.items():
        options = [*TINY, "--duration=2048", "--dropout=0.1", f"--data={DIGITS}", *options]
        assert run_cli(train, f"--outdir={tmp_path / name}", *options).exit_code == 0
    a, b = (torch.load(tmp_path / name / "training-state-0000002.pt")["net"] for name in ("plain", "measured"))
    for key in a:
        assert torch.equal(a[key], b[key])


def test_withdrawn_metrics(digits_ref, tmp_path):
    """A run that resumes from an earlier state measures its later snapshots again; other records stay."""
    run = tmp_path / "run"
    options = [*TINY, f"--data={DIGITS}", "--metrics=fd_pixels", f"--metrics-ref={digits_ref}", "--metrics-num=4"]
    assert run_cli(train, f"--outdir={run}", *options, "--duration=2048").exit_code == 0
    path = run / "metric-fd_pixels.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join([*before, '{"metric": "fd_pixels", "net": "other"}', '{"half": ']) + "\n")
    (run / "training-state-0000002.pt").unlink()
    assert run_cli(train, f"--outdir={run}", *options, "--duration=2048").exit_code == 0
    after = records_in(path)
    assert [record.get("nimg") for record in after] == [1024, 1024, None, 2048, 2048]
    assert [record["results"] for record in after[3:]] == [json.loads(line)["results"] for line in before[2:]]


def test_metrics_options_of_training(digits_ref, tmp_path):
    common = [*TINY, f"--data={DIGITS}", f"--outdir={tmp_path / 'run'}"]
    fails_with(run_cli(train, *common, "--metrics=fd_pixels"), "--metrics and --metrics-ref belong together")
    fails_with(run_cli(train, *common, "--metrics=fdpixels"), "did you mean fd_pixels?")
    fails_with(run_cli(train, *common, "--metrics=fid", f"--metrics-ref={digits_ref}"), "no statistics for fid")
    # What cannot be compared is refused before the training, not after it.
    few = [f"--metrics-ref={digits_ref}", "--metrics-num=100"]
    fails_with(run_cli(train, *common, "--metrics=kd_pixels", *few), "kd_pixels needs 1001 or more images, not 100")
    large = tmp_path / "large.safetensors"
    images = make_dataset(tmp_path / "images", random_images(3, size=16))
    tool("ref", f"--data={images}", f"--dest={large}", "--metrics=fd_pixels", "--workers=0")
    result = run_cli(train, *common, "--metrics=fd_pixels", f"--metrics-ref={large}")
    fails_with(result, "the images are 8x8, those of the reference 16x16")
    assert not list((tmp_path / "run").glob("*.safetensors"))
