"""NVAE's evaluation against golden values: bounds, samples, readjusted batch norm."""

import pytest
import torch
from conftest import Golden
from nvae_golden import FORWARD, published_network, skip_without, stored_noise

from training.likelihood_vae import Bounds, importance_bounds
from training.losses_vae import image_values
from training.networks.nvae_readjust import readjust_batch_norms_

skip_without("evaluation")
EVALUATION = Golden("nvae/evaluation")
IMAGES = 1e-4
CASES = [name for name, value in EVALUATION.meta.items() if isinstance(value, dict) and "args" in value]


def network(case: str):
    return published_network(EVALUATION.meta[case]["args"], EVALUATION.state(f"{case}/state"))


def values(net, images: torch.Tensor) -> torch.Tensor:
    """Stored images, which have their border and are black and white already where they have to be."""
    return images.float() / 255 if net.decoder.levels == 2 else image_values(net.decoder, images)


def stored_draws(case: str, batch: int):
    """A source that gives the stored draws in their order: sample by sample, group by group."""
    samples = EVALUATION.meta[case]["num_iw_samples"]
    draws = iter([eps for k in range(samples) for eps in stored_noise(EVALUATION, f"{case}/elbo/eps/{batch}/{k}")])
    return lambda template: next(draws)


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("max_batch", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_bounds(case, max_batch, close):
    g, m = EVALUATION, EVALUATION.meta[case]
    net, prefix = network(case), f"{case}/elbo"
    found = []
    for batch in range(len(m["batch_sizes"])):
        x = values(net, g[f"{prefix}/x_u8/{batch}"])
        bounds = importance_bounds(net, x, m["num_iw_samples"], stored_draws(case, batch), max_batch)
        close(bounds.recon, g[f"{prefix}/recon/{batch}"].double().mean(dim=1), FORWARD, "recon")
        close(bounds.kl.sum(dim=1), g[f"{prefix}/kl/{batch}"].double().mean(dim=1), FORWARD, "kl")
        log_iw = g[f"{prefix}/log_iw/{batch}"].double()
        expected = torch.tensor(log_iw.shape[1]).log() - log_iw.logsumexp(dim=1)
        close(bounds.neg_log_p, expected, FORWARD, "neg_log_p")
        found.append(bounds)
    together = Bounds(
        *(torch.cat([getattr(b, name) for b in found]) for name in ("recon", "kl", "neg_log_p")), net.dims
    )
    for mine, theirs in (("nelbo", "bpd_elbo"), ("neg_log_p", "bpd_log_p")):
        per_batch = [getattr(b, mine).mean() for b in found]  # the published figure is the mean over batches
        weighted = sum(mean * n for mean, n in zip(per_batch, m["batch_sizes"], strict=True)) / sum(m["batch_sizes"])
        close(getattr(together, mine).mean(), weighted, 1e-12)
        close(weighted, g[f"{prefix}/{mine}"], FORWARD, mine)
        close(together.bits_per_dim(getattr(together, mine).mean()), g[f"{prefix}/{theirs}"], FORWARD, theirs)


@pytest.mark.parametrize("readjusted", [False, True], ids=["as-trained", "readjusted"])
@pytest.mark.parametrize("case", CASES)
def test_samples(case, readjusted, close):
    """Logits, means and drawn images at each temperature, before and after readjustment of the batch norms."""
    g, net = EVALUATION, network(case)
    if readjusted:
        readjust(case, net)
    part = f"{case}/readjust/sample_t" if readjusted else f"{case}/sample/t"
    temperatures = {name[len(part) :].split("/")[0] for name in g.arrays.files if name.startswith(part)}
    assert temperatures
    for t in temperatures:
        noise = stored_noise(g, f"{part}{t}/eps")
        with torch.no_grad():
            logits = net.sample(len(noise[0]), float(t), noise)
        close(logits, g[f"{part}{t}/logits"], FORWARD, "logits")
        close(net.decoder.mean(logits), g[f"{part}{t}/mean"], FORWARD, "mean")
        drawn = {
            name.split("decoder_t")[1].split("/")[0]
            for name in g.arrays.files
            if name.startswith(f"{part}{t}/decoder_t")
        }
        for decoder_t in drawn:
            prefix = f"{part}{t}/decoder_t{decoder_t}"
            uniforms = [g[f"{prefix}/u_component"], g[f"{prefix}/u_logistic"]]
            close(net.decoder.sample(logits, uniforms, float(decoder_t)), g[f"{prefix}/image"], IMAGES, prefix)


def readjust(case: str, net) -> None:
    m = EVALUATION.meta[case]["readjust"]
    draws = iter([eps for i in range(m["iter"]) for eps in stored_noise(EVALUATION, f"{case}/readjust/eps/{i}")])
    readjust_batch_norms_(net, m["t"], m["iter"], m["num_samples"], randn_like=lambda template: next(draws))


@pytest.mark.parametrize("case", CASES)
def test_readjusted_batch_norms(case, close):
    m, net = EVALUATION.meta[case]["readjust"], network(case)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    readjust(case, net)
    after = net.state_dict()
    for key, value in EVALUATION.state(f"{case}/readjust/bn").items():
        close(after[key], value, FORWARD, key)
    changed = {key.rpartition(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert len(changed) == m["bn_layers_changed"]
