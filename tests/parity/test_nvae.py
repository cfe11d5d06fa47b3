"""NVAE's networks against golden values: every file of tests/golden/nvae (or `$OPENEDM2_GOLDEN/nvae`).

Constructor arguments, options and shapes come from the files. Tolerances: the README of the golden set.
"""

import hashlib
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import Golden
from nvae_golden import (
    EXPECTED,
    FORWARD,
    GRADIENT,
    check_output,
    files,
    published_network,
    published_objective,
    start_power_method,
    stored_noise,
)

from training.config.nvae import groups_per_scale
from training.networks.nvae import NVAE
from training.networks.nvae_layers import batch_norms, convolutions, effective_weights

FULL_SIZE = 1e-4
NETWORKS = files("network_*")
PRESETS = [name for name in files("preset_*") if not name.endswith("structure")]


@pytest.mark.parametrize("pattern", EXPECTED)
def test_there_are_files(pattern):
    assert files(pattern)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, close):
    g = Golden(name)
    net = published_network(g.meta["args"], g.state("state"))
    assert net.groups_per_scale == g.meta["groups_per_scale"]
    assert sum(p.numel() for p in net.parameters()) == g.meta["n_params"]
    assert len(convolutions(net)) == g.meta["n_convs"]
    assert len(batch_norms(net)) == g.meta["n_bns"]
    assert [key for key in net.state_dict() if not key.endswith("init_done")] == list(g.state("state"))
    for mode in ("eval", "mean", "train"):
        if f"{mode}/logits" in g.arrays:
            net.train(mode == "train")
            noise = [torch.zeros(len(g["x"]), *shape) for shape in net.latent_shapes]
            with torch.no_grad():
                out = net(g["x"], noise if mode == "mean" else stored_noise(g, f"{mode}/eps"))
            check_output(close, g, mode, net, g["x"], out, FORWARD)


@pytest.mark.parametrize("shared", [False, True], ids=["per-call", "effective_weights"])
@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(name, shared, close):
    """One forward and backward pass in training mode: all parts of the loss, gradients, running statistics."""
    g = Golden(name)
    args, step = g.meta["args"], g.meta["train_step"]
    net = published_network(args, g.state("state")).train()
    objective = published_objective(net, args, args["num_total_iter"])
    start_power_method(objective, g.state("sr_init"))
    with effective_weights(net) if shared else nullcontext():
        losses = objective(net, g["x"], nimg=step, noise=stored_noise(g, "train/eps"))
        regularizer = objective.regularizer(net, step)
        loss = losses.mean() + regularizer
        loss.backward()
    report = objective.report()
    names = dict(
        beta="beta", kl_coeffs="kl_coeffs", kl_groups="kl_vals", spectral_norms="norm_loss", bn_scales="bn_loss"
    )
    for mine, theirs in {**names, "lambda": "wdn_coeff"}.items():
        close(torch.as_tensor(report[mine]), g[f"train/{theirs}"], FORWARD, mine)
    close(losses, g["train/recon"] + g["train/balanced_kl"], FORWARD, "losses")
    close(losses.mean(), g["train/nelbo"], FORWARD, "nelbo")
    close(loss, g["train/loss"], FORWARD, "loss")
    state = net.state_dict()
    for key, value in {**g.state("bn_after"), **g.state("after_init")}.items():
        close(state[key], value, FORWARD, key)
    gradients = g.state("grad")
    largest = max(grad.abs().max() for grad in gradients.values())
    assert {k for k, p in net.named_parameters() if p.grad is None} == set(g.meta["params_without_grad"])
    for key, parameter in net.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - gradients[key]).abs().max() / largest
            assert error <= GRADIENT, f"{key}: {error:.2e} of the largest gradient"


# ---------------------------------------------------------------------------------------------------------
# Published presets


@pytest.mark.slow
def test_structure_of_presets():
    """Names, shapes and counts of all presets at full size, without allocating them."""
    g = Golden("nvae/preset_structure")
    for preset in {key.split("/")[0] for key in g.arrays.files} - {"meta_json"}:
        meta = g.meta[preset]
        with torch.device("meta"):
            net = published_network(meta["args"])
        assert net.groups_per_scale == meta["groups_per_scale"]
        assert list(net.latent_shapes[0]) == meta["z0_size"]
        assert sum(p.numel() for p in net.parameters()) == meta["n_params"]
        assert len(convolutions(net)) == meta["n_convs"]
        assert len(batch_norms(net)) == meta["n_bns"]
        shapes = sorted(f"{name} {'x'.join(map(str, p.shape))}" for name, p in net.named_parameters())
        assert shapes == g.arrays[f"{preset}/param_names_shapes"].tolist()
        assert hashlib.sha256("\n".join(shapes).encode()).hexdigest() == meta["param_names_shapes_sha256"]
        aliases = {key for key in g.arrays[f"{preset}/state_keys"].tolist() if key.endswith(".weight_normalized")}
        assert set(net.state_dict()) | aliases == set(g.arrays[f"{preset}/state_keys"].tolist())


def rule_p(net: NVAE) -> dict[str, torch.Tensor]:
    """Parameters by the rule that the files describe: functions of the name's rank."""
    state = {}
    for n, (name, p) in enumerate(sorted(net.named_parameters())):
        q = torch.sin(1 + n + 0.61803 * torch.arange(p.numel(), dtype=torch.float64)).reshape(p.shape)
        if name.endswith("log_weight_norm"):
            q = 0.1 * q
        elif p.ndim >= 2:
            q = q * math.sqrt(2 * p.shape[0] / p.numel())
        else:
            q = 1 + 0.1 * q if name.endswith("weight") else 0.1 * q
        state[name] = q.float()
    return state


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name, close):
    g = Golden(name)
    net = published_network(g.meta["args"])
    net.load_state_dict(rule_p(net), strict=False)
    R, n = net.img_resolution, net.img_channels
    x = (0.5 + 0.5 * torch.sin(0.37 * torch.arange(n * R * R, dtype=torch.float64))).reshape(1, n, R, R).float()
    if net.decoder.levels == 2:
        x = (x > 0.5).float()
    target = x if net.decoder.levels == 2 else (255 * x).round() / 255
    for mode in {key.split("/")[0] for key in g.arrays.files if "/" in key}:
        noise = [torch.zeros(1, *shape) for shape in net.latent_shapes]
        if mode == "noise":
            counts = [torch.arange(math.prod(shape), dtype=torch.float64) for shape in net.latent_shapes]
            noise = [
                torch.sin(3.1 + i + 0.7 * k).reshape(1, *s).float()
                for i, (k, s) in enumerate(zip(counts, net.latent_shapes, strict=True))
            ]
        with torch.no_grad():
            out = net(x, noise)
        stride = int(g[f"{mode}/logits_stride"])
        close(out.logits[..., ::stride, ::stride], g[f"{mode}/logits_sub"], FULL_SIZE, "logits")
        close(out.logits.flatten()[[0, -1]], g[f"{mode}/logits_first_last"], FULL_SIZE, "first and last")
        check_output(close, g, mode, net, target, out, FULL_SIZE)


def test_groups_per_scale():
    g = Golden("nvae/losses")
    for (scales, groups, ada, least), expected in zip(
        g.arrays["groups_per_scale/args"], g.arrays["groups_per_scale/out"], strict=True
    ):
        actual = groups_per_scale(int(scales), int(groups), bool(ada), int(least))
        assert actual == [n for n in expected.tolist() if n]
