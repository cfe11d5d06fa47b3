"""Training, averages, likelihood and checkpoints of score-SDE models against the published ones."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from golden_files import error
from score_sde_golden import GoldenFile, denoiser, names, network, schedule, shared_entry, shared_network

from training.config.likelihood import FlowLikelihoodConfig
from training.likelihood import dequantized, log_likelihood, to_bits_per_dim
from training.losses import ScoreLoss
from training.lr import warmup_linear
from training.optimizers import AdamOptimizer
from training.phema import RampedEMA
from training.snapshot import load_network

CLOSE = 1e-6
WEIGHTS = 2e-5  # absolute: what rounding does to weights that Adam moves by their sign
BITS, LATENTS = 1e-3, 1e-3  # absolute, and relative to the largest value
MANY = 500  # evaluations
STAGES = 6  # evaluations per step of the solver
FORWARD = 1e-5  # relative to the largest value


@pytest.mark.parametrize("name", names("training*"))
def test_training(name, record_property):
    """Losses, gradient norms, weights and averages of some steps, and the loss of the averages."""
    g = GoldenFile(name)
    config, steps = g.meta["config"], g.meta["n_updates"]
    of, optim = config["model"], config["optim"]
    sde = {"vesde": "VE", "vpsde": "VP", "subvpsde": "subVP"}[config["training"]["sde"]]
    own = schedule(sde, of, None if config["training"]["continuous"] else of["num_scales"])
    net = network(config).train()
    net.load_state_dict({key: value.to(net.state_dict()[key].dtype) for key, value in g.below("init").items()})
    loss = ScoreLoss(own, config["training"]["reduce_mean"], config["training"]["likelihood_weighting"])
    batch = g["batches"].shape[1]
    optimizer = AdamOptimizer(
        net,
        lambda nimg: warmup_linear(nimg, optim["lr"], optim["warmup"] * batch),
        betas=(optim["beta1"], 0.999),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
        max_norm=optim["grad_clip"],
    )
    ema = RampedEMA(net, of["ema_rate"])
    for step in range(steps):
        assert optimizer.learning_rate(step * batch) == pytest.approx(g["lr"][step].item(), rel=CLOSE)
        optimizer.zero_gradients()
        t = loss.times(g["u"][step])
        value = loss(denoiser(net, own), g["batches"][step], t=t, noise=g["z"][step]).mean()
        assert value.item() == pytest.approx(g["losses"][step].item(), rel=1e-5)
        value.backward()
        assert optimizer.gradients.norm().item() == pytest.approx(g["grad_norm_before_clip"][step].item(), rel=1e-5)
        optimizer.step(step * batch)
        ema.update((step + 1) * batch, batch)
    rounding = 2 * g.meta["max_abs_weight_f32_vs_f64"]
    averaged = ema.get()
    errors = {}
    for what, state in [("final", net.state_dict()), ("ema", dict(averaged.named_parameters()))]:
        wanted = g.below(what)
        errors[what] = max(float((state[key].detach() - wanted[key]).abs().max()) for key in wanted)
    record_property("largest_error", max(errors.values()))
    assert max(errors.values()) <= max(rounding, WEIGHTS), errors
    value = loss(denoiser(averaged.eval(), own), g["batches"][0], t=loss.times(g["u"][steps]), noise=g["z"][steps])
    assert value.mean().item() == pytest.approx(g["eval_loss_ema_on_batch0"].item(), rel=1e-5)


class Three(torch.nn.Module):
    """Parameters as described: the last is not trained."""

    def __init__(self, values: list[torch.Tensor], trained: int):
        super().__init__()
        for i, value in enumerate(values):
            self.register_parameter(str(i), torch.nn.Parameter(value.clone(), requires_grad=i < trained))

    @torch.no_grad()
    def set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)


def listed(g: GoldenFile, prefix: str) -> list[torch.Tensor]:
    found = g.below(prefix)
    return [found[key] for key in sorted(found, key=int)]


@pytest.mark.parametrize("name", names("ema*"))
def test_averages(name):
    g = GoldenFile(name)
    compared = 0
    for entry, meta in g.meta.items():
        if not isinstance(meta, dict):
            continue
        net = Three(listed(g, f"{entry}/init"), len(listed(g, f"{entry}/step0/shadow")))
        ema = RampedEMA(net, meta["decay"])
        for step in range(meta["num_updates"]):
            net.set(listed(g, f"{entry}/step{step}/param"))
            ema.update(step + 1, 1)
            values = list(ema.get().parameters())
            for ours, theirs in zip(values, listed(g, f"{entry}/step{step}/shadow"), strict=False):
                assert error(ours, theirs) <= CLOSE, (entry, step)
                compared += 1
            assert all(torch.equal(a, b) for a, b in zip(values, net.parameters(), strict=True) if not b.requires_grad)
    assert compared > 0


def likelihoods() -> list:
    """(file, entry); those of many evaluations are slow."""
    found = [(name, entry, meta) for name in names("likelihood*") for entry, meta in GoldenFile(name).entries().items()]
    slow = pytest.mark.slow
    return [pytest.param(name, entry, marks=[slow] * (meta["nfe"] > MANY)) for name, entry, meta in found]


@pytest.mark.parametrize(("name", "entry"), likelihoods())
def test_likelihood(name, entry, record_property):
    g = GoldenFile(name)
    meta = g.meta[entry]
    net = shared_network(meta["net"]).requires_grad_(False)
    own = schedule(meta["sde"], shared_entry(meta["net"])[1]["model"])
    span = (-1.0, 1.0) if net.centered else (0.0, 1.0)
    data = g[f"{entry}/data"]
    if "/dequant/" in entry:
        low, high = span
        uniform = (data - low) / (high - low) * 256 - g["img_uint8"]
        torch.testing.assert_close(uniform, g["dequant_u"], rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(dequantized(g["img_uint8"], span, 256, "none", None), data, rtol=0, atol=1e-6)

    def run(tolerance: float = 1.0):
        options = FlowLikelihoodConfig(
            rtol=tolerance * meta["rtol"], atol=tolerance * meta["atol"], common_norm=True, first_time=meta["eps"]
        )
        return log_likelihood(denoiser(net, own), data, own, epsilon=g[f"{entry}/epsilon"], options=options)

    result = run()
    bits = to_bits_per_dim(result.log_p, data[0].numel(), span, 256)
    errors = {"bpd": float((bits - g[f"{entry}/bpd"]).abs().max()), "z": error(result.z, g[f"{entry}/z"])}
    record_property("errors", str(errors | {"nfe": (result.nfe, meta["nfe"])}))
    assert abs(result.nfe - meta["nfe"]) <= 3 * STAGES
    assert errors["bpd"] <= BITS, errors
    if errors["z"] > LATENTS:  # random networks: both are then farther from smaller steps than from each other
        exact = run(1 / 30).z
        assert errors["z"] < min(error(result.z, exact), error(g[f"{entry}/z"], exact)), errors


CHECKPOINTS = sorted(path.parent for path in (GOLDEN / "score_sde" / "checkpoints").glob("*/expected.npz"))
assert CHECKPOINTS


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_checkpoint(folder, record_property):
    """Loaded as a snapshot, by the name of the preset that it is like; converted, and back."""
    with np.load(folder / "expected.npz") as f:
        arrays = {key: f[key] for key in f.files}
    meta = json.loads(str(arrays.pop("meta_json")))
    values = {key: torch.from_numpy(value) for key, value in arrays.items()}
    (path,) = folder.glob("checkpoint_*.pth")
    errors = {}
    for which, key in [("ema", "raw_out_ema"), ("model", "raw_out_model_weights")]:
        net = load_network(path, which=which, preset=meta["preset_base"]).net
        errors[key] = error(net.net(values["x"], values["labels"]), values[key])
    snapshot = load_network(path, preset=meta["preset_base"])
    errors["D_ema"] = error(snapshot.net(values["D_input"], values["sigma"]), values["D_ema"])
    record_property("errors", str(errors))
    assert max(errors.values()) <= FORWARD, errors
    assert [f"module.{key.removeprefix('net.')}" for key in snapshot.net.state_dict()] == meta["keys"]
    assert (snapshot.metadata["step"], snapshot.metadata["ema_rate"]) == (meta["step"], meta["ema_decay"])
