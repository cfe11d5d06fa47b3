"""Memory of training runs, planned by a rehearsal: --plan, --batch-gpu=auto, --dry-run=timed."""

import dataclasses
import importlib
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import DIGITS, ROOT, TINY, fails_with, run_cli, torchrun

sys.path.insert(0, str(ROOT))

from benchmarks.memory import measure
from dnnlib.errors import OUT_OF_MEMORY
from train_edm2 import main as train
from training.config.consistency import CONSISTENCY_PRESETS
from training.families import ARCHITECTURES, spec_of_preset
from training.planning.batch import MARGIN, fitting_batch_gpu, planned
from training.planning.memory import Kept, Rehearsal

NO_INTERVALS = {"status": 0, "snapshot": 0, "checkpoint": 0}
TRAINED = {name: entry for name, entry in ARCHITECTURES.items() if entry.training is not None}


def digits(name: str) -> str:
    return next(preset for preset in TRAINED[name].presets if preset.startswith("digits"))


def rehearsal(preset, device: str = "cpu") -> Rehearsal:
    return Rehearsal(preset.config, spec_of_preset(preset, preset.config.data.cond), device)


@pytest.mark.parametrize(
    ("name", "twice"),
    [
        ("edm2.Precond", False),
        pytest.param("uvit.UViTDenoiser", True, marks=pytest.mark.slow),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in TRAINED if name != "edm2.Precond"),
    ],
)
def test_the_plan_is_what_training_allocates(name, twice):
    found = measure(digits(name), 32, twice)
    assert found.allocated == pytest.approx(found.planned, rel=0.1)


@pytest.mark.parametrize("name", ["edm2.Precond", pytest.param("uvit.UViTDenoiser", marks=pytest.mark.slow)])
def test_other_devices_and_precisions_are_rehearsed(name):
    gpu = rehearsal(TRAINED[name].presets[digits(name)], "cuda")
    full, half = gpu.step(64, "fp32", False), gpu.step(64, "fp16", False)
    assert half < 0.9 * full
    assert gpu.step(64, "bf16", False) == half
    assert gpu.step(128, "fp32", False) > 1.5 * full
    assert gpu.kept == rehearsal(TRAINED[name].presets[digits(name)]).kept


def test_computing_activations_twice_takes_less():
    for name in ("score_sde.ScoreSDE", "uvit.UViTDenoiser"):
        net = rehearsal(TRAINED[name].presets[digits(name)], "cuda")
        assert net.step(64, "fp32", True) < 0.8 * net.step(64, "fp32", False), name


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_edm2", ["--preset=digits", f"--data={DIGITS}", "--batch-gpu=4", "--device=cuda", "--channels=8"]),
        pytest.param("train_classifier", ["--preset=digits-classifier"], marks=pytest.mark.slow),
        pytest.param("train_score_sde", ["--preset=digits-vp", "--device=mps"], marks=pytest.mark.slow),
        pytest.param("train_uvit", ["--preset=digits-uvit", "--device=cpu"], marks=pytest.mark.slow),
        pytest.param("train_consistency", ["--preset=digits-ect", "--device=cuda"], marks=pytest.mark.slow),
        pytest.param("train_nvae", ["--preset=digits-nvae"], marks=pytest.mark.slow),
    ],
)
def test_a_plan_needs_no_more_than_a_preset(script, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_cli(importlib.import_module(script).main, "--plan", *options)
    assert result.exit_code == 0, result.output
    parts = [float(n) for n in re.findall(r"^  \D+ ([\d.]+) GB$", result.output, re.M)]
    assert len(parts) == 5 and sum(parts[:4]) == pytest.approx(parts[4], abs=0.003)
    rows = [line for line in result.output.splitlines() if re.match(r"  (fp32|bf16)", line)]
    assert len(rows) == (4 if script in ("train_edm2", "train_score_sde", "train_uvit", "train_consistency") else 2)
    batches = re.search(r"images, in GB:([ \d]+)", result.output)
    assert batches is not None and len(set(batches[1].split())) >= 3
    assert not list(tmp_path.iterdir())


def test_the_largest_round_that_fits():
    preset = TRAINED["edm2.Precond"].presets["digits"]
    config, spec = preset.config, spec_of_preset(preset, True)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, batch=96, **NO_INTERVALS))
    plan = Rehearsal(config, spec, "cuda")
    free = int(MARGIN * (plan.kept.total + plan.step(24, "fp16", False))) + 1
    batch, why = fitting_batch_gpu(config, spec, "cuda", 1, free)
    assert batch == 24 and re.match(r"--batch-gpu=auto: 24, which needs .*; 32 would need", why)
    assert fitting_batch_gpu(config, spec, "cuda", 8, free)[0] == 12
    assert fitting_batch_gpu(config, spec, "cuda", 1, int(0.99 * free))[0] == 16
    with pytest.raises(ValueError, match=r"a single image needs .* try --checkpoint-activations=1"):
        fitting_batch_gpu(config, spec, "cuda", 1, 10**6)


def test_a_state_is_copied_on_a_processor():
    kept = Kept(weights=1, gradients=2, moments=3, averages=4, state=100)
    assert planned(kept, 1000, "cuda", 1) == pytest.approx(MARGIN * 1010)
    assert planned(kept, 1000, "cpu", 1) == pytest.approx(MARGIN * 1110)
    assert planned(kept, 1000, "cpu", 2) == pytest.approx(MARGIN * 1010)


def test_a_processor_has_no_fp16_to_save_memory_by():
    preset = TRAINED["edm2.Precond"].presets["digits"]
    whys = []
    for precision in ("fp32", "fp16"):
        run = dataclasses.replace(preset.config.run, precision=precision, batch=2, **NO_INTERVALS)
        config = dataclasses.replace(preset.config, run=run)
        whys.append(fitting_batch_gpu(config, spec_of_preset(preset), "cpu", 1, 10**12))
    assert whys[0] == whys[1]


def test_consistency_is_rehearsed_on_a_processor():
    """Its loss draws a seed, which is a number."""
    preset = CONSISTENCY_PRESETS["digits-ect"]
    found = Rehearsal(preset.config, spec_of_preset(preset), "cpu")
    assert found.step(8, "fp32", False) > found.step(4, "fp32", False) > 0


@pytest.mark.slow
def test_a_plan_of_two_processes_is_printed_once():
    args = ["--plan", f"--data={DIGITS}", *TINY, "--device=cpu"]
    result = torchrun(2, "train_edm2.py", *args)
    assert result.returncode == 0, result.stderr
    batches = re.findall(r"images, in GB:([ \d]+)", result.stdout)
    assert len(batches) == 1 and batches[0].split()[-1] == "128"  # of 256


def test_a_run_with_the_largest_round_continues_with_another(tmp_path, monkeypatch):
    monkeypatch.setattr("torch_utils.device.free_memory", lambda _device: 10**7)
    common = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--device=cpu"]
    first = run_cli(train, *common, "--batch-gpu=auto", "--duration=1Ki")
    assert first.exit_code == 0, first.output
    chosen = int(re.search(r"--batch-gpu=auto: (\d+), which needs", first.output)[1])
    assert f" of {chosen} images per step" in first.output
    second = run_cli(train, *common, f"--batch-gpu={chosen // 2}", "--duration=2Ki")
    assert second.exit_code == 0 and "Resuming at 1024 images" in second.output, second.output
    monkeypatch.setattr("torch_utils.device.free_memory", lambda _device: 1000)
    fails_with(run_cli(train, *common, "--batch-gpu=auto", "--duration=3Ki"), "--batch-gpu=auto: a single image needs")


def test_a_timed_dry_run_says_what_a_run_takes_and_what_it_will_fail_at(tmp_path, monkeypatch):
    monkeypatch.setattr("training.planning.timing.SECONDS", 0)
    monkeypatch.setattr("training.planning.timing.STEPS", 1)
    options = [f"--outdir={tmp_path / 'x'}", f"--data={DIGITS}", *TINY, "--device=cpu", "--dry-run=timed"]
    result = run_cli(train, *options)
    assert result.exit_code == 0 and "Warning" not in result.output, result.output
    speed = float(re.search(r"Speed: +([\d.e+]+) images per second in 1 timed step", result.output)[1])
    assert speed > 0 and re.search(r"Time: +\d+s for \d+ images", result.output)
    assert re.search(r"Cost: +[\d.e-]+ core-hours", result.output)
    monkeypatch.setattr("training.planning.preflight.free_memory", lambda _device: 1000)
    missing = [f"--val-data={tmp_path / 'none'}", "--metrics=fd_pixels", f"--metrics-ref={tmp_path / 'ref.npz'}"]
    result = run_cli(train, *options, *missing)
    for warning in ("Warning: --metrics-ref=", "Warning: --val-data=", "Warning: that is not enough"):
        assert warning in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_memory_that_one_of_several_processes_lacks_ends_all(tmp_path, monkeypatch):
    """The others are in the middle of a step."""

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr("training.planning.preflight.images_per_second", fails)
    options = [f"--outdir={tmp_path / 'x'}", f"--data={DIGITS}", *TINY, "--device=cpu", "--dry-run=timed"]
    result = run_cli(train, *options)
    assert result.exit_code == 0 and f"Warning: {OUT_OF_MEMORY}" in result.output, result.output
    monkeypatch.setattr("training.planning.preflight.distributed", SimpleNamespace(get_world_size=lambda: 2))
    fails_with(run_cli(train, *options), OUT_OF_MEMORY, exit_code=1)
