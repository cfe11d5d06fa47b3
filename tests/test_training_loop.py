"""Training runs: exact resumes, any number of processes, nothing silent."""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, ROOT, TINY, fails_with, make_dataset, npy, random_images, run_cli, torchrun

from torch_utils.gradients import count_nonfinite, replace_nonfinite_
from train_edm2 import main as train
from training import training_loop
from training.losses import EDM2Loss
from training.monitoring.journal import Journal
from training.snapshot import load_network


def run_dir(path: Path, *options, ok=True) -> Path:
    """Train for about a second into `path`."""
    result = run_cli(train, f"--outdir={path}", f"--data={DIGITS}", *TINY, *options)
    assert (result.exit_code == 0) == ok, result.output
    return path


def state(path: Path, kimg: int = 1) -> dict:
    return torch.load(path / f"training-state-{kimg:07d}.pt", weights_only=True)


def assert_same_state(a, b, where=""):
    """Bitwise equality of nested containers, but for wall clock time."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert_same_state(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def largest_difference(a: dict, b: dict) -> float:
    return max(((a["net"][k] - b["net"][k]).norm() / b["net"][k].norm().clamp(min=1e-6)).item() for k in a["net"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return run_dir(tmp_path_factory.mktemp("run") / "a")


def test_files_of_a_run(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "training_options.json",
        "log.txt",
        "stats.jsonl",
        "reals.png",
        "fakes-0000001.png",
        "network-snapshot-0000001-0.050.safetensors",
        "network-snapshot-0000001-0.100.safetensors",
        "training-state-0000001.pt",
    }
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    stats = [json.loads(line) for line in (finished / "stats.jsonl").read_text().splitlines()]
    assert [s["nimg"] for s in stats] == [512, 1024]
    assert stats[1]["loss"] < stats[0]["loss"]
    assert all(s["nonfinite_gradients"] == 0 and s["images_per_second"] > 0 and s["lr"] > 0 for s in stats)
    assert "Done: 1024 images" in (finished / "log.txt").read_text()
    snapshot = load_network(finished / "network-snapshot-0000001-0.100.safetensors")
    assert snapshot.metadata["nimg"] == 1024
    assert snapshot.metadata["ema_std"] == 0.1
    assert snapshot.metadata["dataset"]["count"] == 1797
    assert snapshot.metadata["config"]["lr"] == 0.04
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [512, 1024]


def test_resumed_run_equals_uninterrupted_one(finished, tmp_path):
    part = run_dir(tmp_path / "b", "--duration=512")
    assert state(part, 0)["nimg"] == 512
    run_dir(part)
    assert_same_state(state(part), state(finished))
    ours, theirs = (
        [
            {k: s[k] for k in ("nimg", "loss", "loss_std", "lr")}
            for s in map(json.loads, (path / "stats.jsonl").read_text().splitlines())
        ]
        for path in (part, finished)
    )
    assert ours == theirs
    for name in ("network-snapshot-0000001-0.050.safetensors", "fakes-0000001.png", "reals.png"):
        first, second = (path / name for path in (part, finished))
        if name.endswith(".png"):
            assert first.read_bytes() == second.read_bytes()
        else:
            assert_same_state(load_network(first).net.state_dict(), load_network(second).net.state_dict())


def test_moments_are_stored_in_the_shapes_of_the_weights(finished):
    """Whatever the order of dimensions in memory, so that states go from one device to another."""
    found = state(finished)
    net = load_network(finished / "network-snapshot-0000001-0.050.safetensors").net
    shapes = [p.shape for p in net.parameters()]
    assert any(shape[-1:] == (3,) for shape in shapes)
    for name in ("exp_avg", "exp_avg_sq"):
        assert [moments[name].shape for moments in found["optimizer"]["state"].values()] == shapes


def test_damaged_state_falls_back_to_the_one_before(finished, tmp_path):
    part = run_dir(tmp_path / "b", "--duration=512")
    (part / "training-state-0000001.pt").write_bytes(b"PK truncated")
    # As if it had been further, and then the power had failed.
    (part / "stats.jsonl").write_bytes((finished / "stats.jsonl").read_bytes() + b'{"nimg": 15\n\n\0\0\xff')
    (part / ".training-state-0000001.pt.123.tmp").write_bytes(b"half")
    result = run_cli(train, f"--outdir={part}", f"--data={DIGITS}", *TINY)
    assert "training-state-0000001.pt is damaged and skipped" in result.output
    assert "Resuming at 512 images" in result.output
    assert_same_state(state(part), state(finished))
    assert len((part / "stats.jsonl").read_text().splitlines()) == 2
    assert not list(part.glob("*.tmp")) and not list(part.glob(".*.tmp"))


def test_run_that_failed_before_its_first_result_may_start_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(EDM2Loss, "__call__", lambda self, *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_dir(tmp_path, "--lr=0.01")
    monkeypatch.undo()
    run_dir(tmp_path)


def test_states_without_their_options(tmp_path):
    run_dir(tmp_path)
    (tmp_path / "training_options.json").unlink()
    result = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY)
    fails_with(result, "but no training_options.json")


def test_one_run_at_a_time(tmp_path):
    with Journal(tmp_path):
        fails_with(
            run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY), "is in use by another training run"
        )
    run_dir(tmp_path)


def test_large_seed(tmp_path):
    run_dir(tmp_path, f"--seed={2**32 - 1}", "--duration=256")


def test_finished_run_has_nothing_to_do(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")}
    result = run_cli(train, f"--outdir={finished}", f"--data={DIGITS}", *TINY)
    assert "Nothing to do" in result.output
    assert {p: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")} == before


def test_seed_matters(finished, tmp_path):
    assert largest_difference(state(run_dir(tmp_path / "b", "--seed=1")), state(finished)) > 0.1


def test_accumulation_rounds_give_the_same_training(finished, tmp_path):
    rounds = run_dir(tmp_path / "b", "--batch-gpu=64")
    assert largest_difference(state(rounds), state(finished)) < 1e-3


def test_two_processes_equal_two_accumulation_rounds(tmp_path):
    # With dropout, to cover the masks too.
    options = ["--dropout=0.1", "--batch-gpu=128"]
    one = run_dir(tmp_path / "one", *options)
    done = torchrun(2, "train_edm2.py", f"--outdir={tmp_path / 'two'}", f"--data={DIGITS}", *TINY, *options)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu, 1 round of 128 images" in done.stdout
    assert largest_difference(state(tmp_path / "two"), state(one)) < 1e-4
    # And a run can go on with another number of processes.
    run_dir(tmp_path / "half", *options, "--duration=512")
    torchrun(2, "train_edm2.py", f"--outdir={tmp_path / 'half'}", f"--data={DIGITS}", *TINY, *options)
    assert largest_difference(state(tmp_path / "half"), state(one)) < 1e-4


def test_unconditional(tmp_path):
    path = run_dir(tmp_path / "run", "--cond=0")
    assert load_network(path / "network-snapshot-0000001-0.050.safetensors").net.label_dim == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions(tmp_path, precision):
    result = run_cli(
        train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--duration=256", f"--precision={precision}"
    )
    assert ("using fp32" in result.output) == (precision == "fp16")
    assert f", {'fp32' if precision == 'fp16' else precision}, 1 x cpu" in result.output


def test_loss_scaling_changes_nothing_in_float32(finished, tmp_path):
    scaled = run_dir(tmp_path / "run", "--ls=64")
    assert largest_difference(state(scaled), state(finished)) < 1e-4


@pytest.mark.parametrize("channels", [4, 8])
def test_latents(tmp_path, channels):
    rng = np.random.default_rng(0)
    files = {f"00000/{i}.npy": npy(np.abs(rng.normal(size=[channels, 8, 8])).astype(np.float32)) for i in range(20)}
    data = make_dataset(tmp_path / "data.zip", files)
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--cond=0", *TINY, "--duration=256")
    assert result.exit_code == 0, result.output
    snapshot = load_network(tmp_path / "run" / "network-snapshot-0000000-0.050.safetensors")
    assert snapshot.net.img_channels == 4
    assert type(snapshot.encoder).__name__ == ("RawLatentEncoder" if channels == 4 else "StabilityVAEEncoder")
    # The VAE cannot be had in a test: the pictures show latents, and say so.
    assert ("shows latents, not pixels" in result.output) == (channels == 8)


def test_color_images_in_loader_processes(tmp_path):
    data = make_dataset(tmp_path / "data", random_images(20))
    result = run_cli(
        train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--cond=0", *TINY, "--duration=512", "--workers=1"
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_saves_its_state_and_continues(tmp_path, sig):
    command = [sys.executable, "train_edm2.py", f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY]
    process = subprocess.Popen(
        [*command, "--duration=100Mi", "--status=256", "--workers=1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("nimg"):
            os.killpg(process.pid, sig)  # as terminals and torchrun do: loader processes are in the group, too
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "Asked to stop: trying to save the state first" in errors
    match = re.search(r"Suspended at (\d+) images", output)
    assert match
    suspended_at = int(match[1])
    saved = state(tmp_path, suspended_at // 1000)
    assert saved["nimg"] == suspended_at
    result = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, f"--duration={suspended_at + 256}")
    assert f"Resuming at {suspended_at} images" in result.output


def test_killed_while_saving_loses_nothing(tmp_path):
    killed = tmp_path / "killed"
    command = [sys.executable, "train_edm2.py", f"--outdir={killed}", f"--data={DIGITS}", *TINY, "--duration=100Mi"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # results depend on it
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    # Until it is caught in the act, with a state before that.
    while not list(killed.glob(".*.tmp")) or not list(killed.glob("training-state-*.pt")):
        assert time.time() < deadline
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    newest = torch.load(max(killed.glob("training-state-*.pt")), weights_only=True)["nimg"]
    result = run_cli(train, f"--outdir={killed}", f"--data={DIGITS}", *TINY, f"--duration={newest + 1024}")
    assert f"Resuming at {newest} images" in result.output
    whole = run_dir(tmp_path / "whole", f"--duration={newest + 1024}")
    assert_same_state(state(killed, (newest + 1024) // 1000), state(whole, (newest + 1024) // 1000))


def test_non_finite_gradients_are_replaced_and_reported(tmp_path, monkeypatch):
    original, calls = EDM2Loss.__call__, []

    def spoiled(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(EDM2Loss, "__call__", spoiled)
    result = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY)
    assert result.exit_code == 0
    assert "non-finite gradients were replaced by 0" in result.output
    assert all(torch.isfinite(t).all() for t in state(tmp_path)["net"].values())
    stats = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [s["nonfinite_gradients"] > 0 for s in stats] == [True, False]


def test_finite_gradients_whose_sum_overflows_are_kept():
    values = torch.full([4], 3e38)
    assert count_nonfinite(values) == 0
    assert torch.equal(values, torch.full([4], 3e38))
    values = torch.tensor([1, math.nan, math.inf, -math.inf])
    assert count_nonfinite(values) == 3
    replace_nonfinite_(values)
    assert values.tolist() == [1, 0, 0, 0]


def test_divergence_stops_the_run(tmp_path, monkeypatch):
    original = EDM2Loss.__call__
    monkeypatch.setattr(EDM2Loss, "__call__", lambda self, *a, **k: original(self, *a, **k) * float("nan"))
    result = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY)
    fails_with(result, "the loss is not finite at 512 images", "--lr", exit_code=1)


def test_noise_depends_on_seed_and_image_alone():
    a = training_loop.image_seeds(0, np.arange(10))
    assert a.tolist() == list(range(10))
    assert len(set(training_loop.image_seeds(3, np.arange(1000)))) == 1000
    assert not set(training_loop.image_seeds(1, np.arange(1000))) & set(a)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("limited", [False, True])
def test_freed_memory_is_kept(limited):
    """Memory that was used before costs no page faults; also where addresses are limited."""
    code = """
import resource, sys, torch
from torch_utils.cpu_memory import keep_freed_memory
if sys.argv[1] == "True":
    resource.setrlimit(resource.RLIMIT_AS, (32 << 30, -1))
keep_freed_memory(huge_pages=True)
faults = []
for _ in range(12):
    torch.ones(8 << 20), torch.ones(3 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-3])
"""
    command = [sys.executable, "-c", code, str(limited)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 500  # of 11,264 pages each time


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_training_on_a_gpu(tmp_path, precision):
    path = run_dir(tmp_path / "run", "--device=cuda", f"--precision={precision}")
    stats = [json.loads(line) for line in (path / "stats.jsonl").read_text().splitlines()]
    assert stats[-1]["loss"] < stats[0]["loss"]
    assert stats[-1]["gpu_mem_gb"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiled_and_checkpointed_training_is_the_same_training(finished, tmp_path):
    # Weights are no measure: Adam takes steps of full size along gradients that are only rounding errors at first.
    losses = [
        [json.loads(line)["loss"] for line in (run / "stats.jsonl").read_text().splitlines()]
        for run in (finished, run_dir(tmp_path, "--compile=1", "--checkpoint-activations=1"))
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr("torch.compile", no_compiler)
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--compile=1"]
    fails_with(run_cli(train, *args), "--compile=1", "no C++ compiler found", "leave it out")


def test_running_statistics_are_averaged_over_processes(tmp_path):
    script = tmp_path / "average.py"
    script.write_text(
        "import torch\n"
        "from torch_utils import distributed\n"
        "from training.monitoring.snapshots import average_batch_statistics_\n"
        "distributed.init()\n"
        "net = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.BatchNorm1d(1, track_running_stats=False))\n"
        "net[0].running_mean.fill_(distributed.get_rank())\n"
        "average_batch_statistics_(net)\n"
        "assert net[0].running_mean.tolist() == [0.5, 0.5] and net[0].running_var.tolist() == [1, 1]\n"
        "distributed.shutdown()\n"
    )
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr
