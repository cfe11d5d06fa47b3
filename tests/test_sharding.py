"""Weights shared out over processes (--shard): the same training, and states that any number of processes continue."""

import importlib
import pickle
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import DIGITS, ROOT, TINY, fails_with, run_cli, torchrun

from torch_utils.sharded_state import load_pieces, load_rest
from train_edm2 import main as train
from train_nvae import main as train_nvae
from training.config.training import OPTIONS_NAME
from training.snapshot import load_network

OPTIONS = [f"--data={DIGITS}", *TINY, "--batch=64", "--batch-gpu=16", "--device=cpu", "--preview=0"]


def newest(run: Path) -> dict:
    """The newest state of a run, whole."""
    path = max(run.glob("training-state-*"))
    return load_pieces(path, None) if path.is_dir() else torch.load(path, weights_only=True)


def assert_near(found, wanted, path: str = "") -> None:
    """Trees of the same keys, whose tensors differ by less than 1e-5, or of their size."""
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text: f"{path}: {text}")
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            assert_near(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for i, value in enumerate(wanted):
            assert_near(found[i], value, f"{path}/{i}")
    else:
        assert found == wanted, path


def assert_same_training(found: Path, wanted: Path) -> None:
    mine, theirs = newest(found), newest(wanted)
    assert mine["nimg"] == theirs["nimg"]
    assert_near({"net": mine["net"], "ema": mine["ema"]}, {"net": theirs["net"], "ema": theirs["ema"]})
    for idx, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            difference = (mine["optimizer"]["state"][idx][name] - value).norm()
            assert difference <= 1e-4 * value.norm() + 1e-9, (idx, name)
    snapshots = [max(run.glob("network-snapshot-*.safetensors")) for run in (found, wanted)]
    assert snapshots[0].name == snapshots[1].name
    ours, their = (load_network(path).net.state_dict() for path in snapshots)
    for name, value in their.items():  # of float16
        torch.testing.assert_close(
            ours[name], value, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A run of two processes that share out the weights, at 512 images."""
    run = tmp_path_factory.mktemp("shared") / "run"
    done = torchrun(2, "train_edm2.py", f"--outdir={run}", *OPTIONS, "--duration=512", "--shard=2")
    assert done.returncode == 0, done.stderr
    assert "Saved a training state of" in done.stdout and "in pieces: training waited" in done.stdout
    return run


def test_another_number_of_processes_continues_a_state_in_pieces(shared, tmp_path):
    (state,) = shared.glob("training-state-*")
    assert state.is_dir() and len(list(state.glob("*.distcp"))) == 2
    assert load_rest(state)["nimg"] == 512
    shutil.copytree(shared, tmp_path / "run")
    dry = run_cli(train, f"--outdir={tmp_path / 'run'}", *OPTIONS, "--duration=1Ki", "-n")
    assert "Would resume at 512 images" in dry.output, dry.output
    options = tmp_path / "run" / OPTIONS_NAME
    stored = options.read_text()
    options.write_text(stored.replace('"dropout_masks": "image"', '"dropout_masks": "round"'))
    dry = run_cli(train, f"--outdir={tmp_path / 'run'}", *OPTIONS, "--duration=1Ki", "-n")  # which it keeps
    assert 'dropout_masks:    "round"' in dry.output, dry.output
    options.write_text(stored)
    for run in ("run", "whole"):
        result = run_cli(train, f"--outdir={tmp_path / run}", *OPTIONS, "--duration=1Ki")
        assert result.exit_code == 0, result.output
        assert ("Resuming at 512 images" in result.output) == (run == "run")
    assert_same_training(tmp_path / "run", tmp_path / "whole")


def test_damaged_and_hostile_states_in_pieces_are_skipped(shared, tmp_path):
    (state,) = shared.glob("training-state-*")

    def refused(spoil, match: str) -> None:
        copy = Path(shutil.copytree(state, tmp_path / match / state.name))
        spoil(copy)
        with pytest.raises(ValueError, match=match):
            load_pieces(copy, None)

    def flip(copy: Path) -> None:
        path = min(copy.glob("*.distcp"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def run_something(copy: Path) -> None:
        (copy / ".metadata").write_bytes(pickle.dumps(print))
        rest = torch.load(copy / "rest.pt", weights_only=True)
        torch.save({**rest, "checksums": {}}, copy / "rest.pt")

    refused(flip, "checksum mismatch in __0_0.distcp")
    refused(run_something, "the record names builtins.print")


def test_what_is_not_shared_out_is_said(tmp_path):
    outdir = tmp_path / "run"
    result = run_cli(train, f"--outdir={outdir}", *OPTIONS, "--shard=2")
    fails_with(result, "--shard=2: the number of processes, 1, is no multiple of it: start with torchrun")
    result = run_cli(train_nvae, f"--outdir={outdir}", f"--data={DIGITS}", "--preset=digits-nvae", "--shard=2")
    fails_with(result, "--shard=2: networks of NVAE are not shared out: leave it out")
    assert not outdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "preset", "processes", "shard", "options"),
    [
        ("train_edm2", "digits", 4, 4, []),
        ("train_edm2", "digits", 4, 2, ["--checkpoint-activations=1"]),
        ("train_score_sde", "digits-vp", 2, 2, []),
        ("train_score_sde", "digits-ve", 4, 2, []),
        ("train_uvit", "digits-uvit", 4, 4, ["--checkpoint-activations=1"]),
    ],
)
def test_families_train_as_on_one_process(script, preset, processes, shard, options, tmp_path):
    """From a state of a whole network on, in one group of processes or several."""
    common = [f"--data={DIGITS}", f"--preset={preset}", "--batch=64", "--batch-gpu=16", "--device=cpu", "--preview=0"]
    common += ["--status=512", "--snapshot=1024", "--checkpoint=1024"]
    command = importlib.import_module(script).main
    assert run_cli(command, f"--outdir={tmp_path / 'pieces'}", *common, "--duration=512").exit_code == 0
    more = [*common, "--duration=1Ki", f"--shard={shard}", *options]
    done = torchrun(processes, f"{script}.py", f"--outdir={tmp_path / 'pieces'}", *more)
    assert done.returncode == 0 and "Resuming at 512 images" in done.stdout, done.stderr
    assert run_cli(command, f"--outdir={tmp_path / 'whole'}", *common, "--duration=1Ki").exit_code == 0
    assert_same_training(tmp_path / "pieces", tmp_path / "whole")


def run_together(processes: int, folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run lines of Python in several processes, which can import the project."""
    script = folder / "script.py"
    script.write_text(f"import sys\n\nsys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}")
    return torchrun(processes, script)


@pytest.mark.slow
def test_totals_count_all_pieces_and_what_is_whole_once(tmp_path):
    done = run_together(
        2,
        tmp_path,
        """
        import torch

        from torch_utils import distributed
        from torch_utils.gradients import replace_nonfinite_
        from training.config.edm2 import TRAINING_PRESETS
        from training.families import preset_network, trained_by
        from training.holding import Shared

        distributed.init()
        preset = TRAINING_PRESETS["digits"]
        entry, config = trained_by(preset.config), preset.config
        torch.manual_seed(0)
        net = preset_network(preset)
        whole = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        whole["unet.out_gain"].fill_(float("nan"))  # of all processes
        whole["unet.out_conv.weight"].fill_(float("inf"))  # of which one has the only row
        holding = Shared(entry, net, 2)
        optimizer = entry.optimizer(holding.held, config)
        holding.attach(optimizer)
        for name, p in holding.held.named_parameters():
            p.grad.copy_(holding.pieces.rows(name, whole[name]))
        count = optimizer.totals.count_nonfinite(optimizer.gradients)
        replace_nonfinite_(optimizer.gradients)
        bad = sum((~value.isfinite()).sum() for value in whole.values())
        norm = torch.stack([v.nan_to_num(0, 0, 0).norm() for v in whole.values()]).norm()
        assert count == bad > 1, (count, bad)
        torch.testing.assert_close(optimizer.totals.norm(optimizer.gradients), norm)
        distributed.shutdown()
        """,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_groups_are_compared(tmp_path):
    done = run_together(
        4,
        tmp_path,
        """
        import torch

        from torch_utils import distributed
        from training.config.edm2 import TRAINING_PRESETS
        from training.families import preset_network, trained_by
        from training.holding import Shared

        distributed.init()
        preset = TRAINING_PRESETS["digits"]
        torch.manual_seed(0)
        holding = Shared(trained_by(preset.config), preset_network(preset), 2)
        holding.check_same("weights")
        distributed.print0("the same so far")
        if distributed.get_rank() == 3:
            with torch.no_grad():
                holding.held.unet.emb_noise.weight[0, 0] += 1
        holding.check_same("weights")
        """,
    )
    assert done.returncode != 0 and "the same so far" in done.stdout, done.stderr
    assert "process 3" in done.stderr and "holds other weights than the rest" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["pixels32-cpu", "pixels32-vp-cpu", "pixels32-uvit-cpu"])
def test_the_plan_is_what_processes_allocate(preset, tmp_path):
    done = run_together(
        2,
        tmp_path,
        f"""
        import dataclasses

        from benchmarks.memory import allocated, preset_of, train
        from torch_utils import distributed
        from training.families import spec_of_preset
        from training.planning.memory import Rehearsal

        distributed.init()
        preset = preset_of({preset!r})
        config = dataclasses.replace(preset.config, run=dataclasses.replace(preset.config.run, shard=2))
        plan = Rehearsal(config, spec_of_preset(preset, config.data.cond), "cpu")
        planned = plan.kept.total + plan.step(4, "fp32", False)
        found = allocated(lambda: train(preset, 4, False, shard=2))
        distributed.print0(f"planned {{planned / 1e6:.1f}} MB, allocated {{found / 1e6:.1f}} MB")
        assert abs(found / planned - 1) < 0.1
        distributed.shutdown()
        """,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
