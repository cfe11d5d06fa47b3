"""Published checkpoints of NVAE: read, used, resumed and written back, against golden values."""

import pytest
import torch
from conftest import GOLDEN, Golden
from nvae_golden import FORWARD, files, published_objective, skip_without, start_power_method, stored_noise

from training.losses_vae import image_values, reconstruction_loss
from training.lr import warmup_cosine_by_epochs
from training.networks.nvae_layers import effective_weights
from training.snapshot.published_nvae import Checkpoint, load_checkpoint, save_checkpoint

skip_without("checkpoints*")
CHECKPOINTS = GOLDEN / "nvae" / "checkpoints"
VALUES = Golden("nvae/checkpoints")
FILES = sorted(path.name for path in CHECKPOINTS.glob("*.pt"))
TRAJECTORY, BIAS = 1e-4, 1e-3


def expected_values(name: str) -> tuple[Golden, str]:
    """The file and prefix that hold the values of a checkpoint."""
    stem = name.removesuffix(".pt").removeprefix("checkpoint")
    own = [file for file in files("checkpoints_*") if stem and file.endswith(f"checkpoints{stem}")]
    if own:
        return Golden(own[0]), ""
    return VALUES, "final/" if "final" in stem else "mid/"


def test_there_are_checkpoints():
    assert FILES


def compare(close, checkpoint: Checkpoint, g: Golden, prefix: str) -> None:
    net = checkpoint.net
    assert not net.training
    with torch.no_grad():
        out = net(g[f"{prefix}x"], stored_noise(g, f"{prefix}eps"))
        for key in out._fields:
            close(getattr(out, key), g[f"{prefix}{key}"], FORWARD, key)
        if f"{prefix}recon" in g.arrays:
            close(reconstruction_loss(net, out.logits, g[f"{prefix}x"]), g[f"{prefix}recon"], FORWARD, "recon")
        samples = f"{prefix}sample_t"
        for t in {name[len(samples) :].split("/")[0] for name in g.arrays.files if name.startswith(samples)}:
            noise = stored_noise(g, f"{samples}{t}/eps")
            logits = net.sample(len(noise[0]), float(t), noise)
            close(logits, g[f"{samples}{t}/logits"], FORWARD, "sample")
            close(net.decoder.mean(logits), g[f"{samples}{t}/mean"], FORWARD, "mean")
    for key, value in g.state(f"{prefix}state").items():
        assert torch.equal(net.state_dict()[key], value), key


@pytest.mark.parametrize("name", FILES)
def test_checkpoint(name, tmp_path, close):
    checkpoint = load_checkpoint(CHECKPOINTS / name)
    g, prefix = expected_values(name)
    compare(close, checkpoint, g, prefix)
    if prefix == "mid/":
        assert (checkpoint.epoch, checkpoint.global_step) == tuple(
            VALUES.meta["checkpoint"][k] for k in ("epoch", "global_step")
        )
        assert checkpoint.args == VALUES.meta["checkpoint"]["args"]
        assert checkpoint.scheduler == VALUES.meta["checkpoint"]["scheduler"]
        assert checkpoint.grad_scalar == VALUES.meta["checkpoint"]["grad_scalar"]
    save_checkpoint(tmp_path / "again.pt", checkpoint)
    compare(close, load_checkpoint(tmp_path / "again.pt"), g, prefix)


@pytest.mark.parametrize("name", [name for name in FILES if "old_args" not in name])
def test_written_as_published(name, tmp_path):
    """What we write holds the same things under the same names as the file it was read from."""
    save_checkpoint(tmp_path / "again.pt", load_checkpoint(CHECKPOINTS / name))
    theirs, ours = (
        torch.load(path, map_location="cpu", weights_only=False) for path in (CHECKPOINTS / name, tmp_path / "again.pt")
    )
    assert list(ours) == list(theirs)
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    assert ours["args"] == theirs["args"]
    for key in ("epoch", "global_step", "arch_instance", "scheduler", "grad_scalar"):
        assert ours[key] == theirs[key], key
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for i, state in theirs["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(ours["optimizer"]["state"][i][key]), torch.as_tensor(value)), (i, key)
    assert {k for g in theirs["optimizer"]["param_groups"] for k in g} == {
        k for g in ours["optimizer"]["param_groups"] for k in g
    }


def test_resume(close):
    """Training continues from a checkpoint as the published code does, to the same weights."""
    g, m = VALUES, VALUES.meta["resume"]
    checkpoint = load_checkpoint(CHECKPOINTS / "checkpoint.pt")
    net, args = checkpoint.net.train(), checkpoint.args
    objective = published_objective(net, args, args["num_total_iter"])
    start_power_method(objective, g.state("resume/sr_init"))
    optimizer = torch.optim.Adamax(net.parameters(), eps=1e-3, weight_decay=args["weight_decay"], foreach=True)
    for name, state in checkpoint.optimizer.items():
        optimizer.state[net.get_parameter(name)] = {**state, "step": torch.tensor(float(state["step"]))}
    epoch_batches = args["num_total_iter"] // args["epochs"]
    for i, step in enumerate(m["steps"]):
        assert step == int(g[f"resume/step/{i}"]) == checkpoint.global_step + i
        optimizer.param_groups[0]["lr"] = warmup_cosine_by_epochs(
            step,
            1,
            epoch_batches,
            args["epochs"],
            args["warmup_epochs"],
            args["learning_rate"],
            args["learning_rate_min"],
        )
        optimizer.zero_grad()
        with effective_weights(net):
            x = image_values(net.decoder, g[f"resume/x_u8/{i}"])
            losses = objective(net, x, nimg=step, noise=stored_noise(g, f"resume/eps/{i}"))
            (losses.mean() + objective.regularizer(net, step)).backward()
        optimizer.step()
    state = net.state_dict()
    expected = g.state("resume/final_state")
    assert expected
    for name, value in expected.items():
        tolerance = BIAS if name.endswith("bias") else TRAJECTORY
        assert (state[name].double() - value.double()).abs().max() <= tolerance, name
