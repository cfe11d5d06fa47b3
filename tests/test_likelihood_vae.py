"""Bounds on the likelihood of NVAE, and readjusted batch norm."""

import math

import pytest
import torch

from dnnlib.errors import UserError
from training.likelihood_vae import VAELikelihood, importance_bounds
from training.networks.nvae import NVAE
from training.networks.nvae_readjust import readjust_batch_norms_
from training.samplers import StackedRandomGenerator

OPTIONS = dict(
    num_latent_scales=2,
    num_groups_per_scale=1,
    num_latent_per_group=2,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_blocks=0,
    num_postprocess_blocks=0,
    num_mixture_dec=2,
    use_se=True,
    res_dist=True,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = NVAE(8, 1, levels=17, **OPTIONS)
    with torch.no_grad():
        net(torch.rand(16, 1, 8, 8))
    return net.eval()


@pytest.fixture
def images():
    return torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def rnd(seeds=(1, 2, 3)):
    return StackedRandomGenerator("cpu", seeds)


def test_an_image_depends_on_itself_alone(net, images):
    """Neither the other images nor the size of passes change a bound."""
    likelihood = VAELikelihood(net, 20)
    together = likelihood(images, rnd())
    for max_batch in (3, 7, 1000):
        assert torch.allclose(VAELikelihood(net, 20, max_batch)(images, rnd()), together, rtol=1e-6)
    alone = likelihood(images[1:2], rnd([2]))
    assert torch.allclose(alone, together[1:2], rtol=1e-6)
    assert together.dtype == torch.float64


def test_bounds_are_ordered(net, images):
    """More importance samples give a tighter bound on average, and one sample gives the evidence lower bound."""
    few, many = (VAELikelihood(net, k).bounds(images, rnd()) for k in (1, 500))
    assert (many.neg_log_p < many.nelbo).all()
    assert torch.allclose(few.kl.shape and few.recon, few.recon)
    assert torch.allclose(many.bits_per_dim(many.nelbo), many.nelbo / (64 * math.log(2)))
    assert many.kl.shape == (3, 2)


def test_bound_of_a_network_without_latents(net, images):
    """Where posterior and decoder ignore the latents, both bounds are the likelihood itself."""
    with torch.no_grad():
        for p in net.image_conditional.parameters():
            p.zero_()
        for sampler in net.enc_sampler:
            sampler.log_weight_norm.fill_(-50)
            sampler.bias.zero_()
    bounds = importance_bounds(net, images.float().mul(17 / 256).floor() / 16, 5, rnd().randn_like)
    assert torch.allclose(bounds.kl, torch.zeros_like(bounds.kl), atol=1e-6)
    assert torch.allclose(bounds.neg_log_p, bounds.recon, rtol=1e-5)
    assert torch.allclose(bounds.nelbo, bounds.recon)


def test_number_of_samples(net):
    for name in ("num_samples", "max_batch"):
        with pytest.raises(UserError, match=name):
            VAELikelihood(net, **{"num_samples": 1, name: 0})


def test_readjusted_batch_norms(net):
    """Only the decoder's statistics move, to finite values that depend on the seed alone."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    readjust_batch_norms_(net, 0.7, batches=3, batch_size=4)
    assert not net.training and not any(m.training for m in net.modules())
    first = {key: value.clone() for key, value in net.state_dict().items()}
    changed = {key.split(".")[0] for key, value in first.items() if not torch.equal(value, before[key])}
    assert changed == {"dec_tower"}
    assert all(value.isfinite().all() for value in first.values())
    net.load_state_dict(before)
    with torch.autocast("cpu", torch.bfloat16):
        readjust_batch_norms_(net, 0.7, batches=3, batch_size=4)
    for key, value in first.items():
        assert torch.equal(net.state_dict()[key], value), key
    for temperature in (0, -1, math.nan):
        with pytest.raises(UserError, match="temperature"):
            readjust_batch_norms_(net, temperature)
