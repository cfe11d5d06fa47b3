"""Properties of NVAE's network and distributions."""

import math

import pytest
import torch
import torch.nn.functional as F

from dnnlib.errors import UserError
from training.config.nvae import groups_per_scale
from training.networks import nvae_cpu
from training.networks.nvae import NVAE
from training.networks.nvae_cells import ARCHITECTURES
from training.networks.nvae_distributions import BernoulliDecoder, LogisticMixtureDecoder, NormalDecoder
from training.networks.nvae_layers import BatchNorm2d, Conv2d, SkipDown, effective_weights
from training.samplers import StackedRandomGenerator

TINY = dict(
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=3,
    num_channels_enc=8,
    num_channels_dec=8,
    num_preprocess_blocks=1,
    num_preprocess_cells=1,
    num_postprocess_blocks=1,
    num_postprocess_cells=1,
    num_mixture_dec=2,
    use_se=True,
    res_dist=True,
)


def tiny(seed: int = 0, resolution: int = 8, channels: int = 3, **changes) -> NVAE:
    torch.manual_seed(seed)
    net = NVAE(resolution, channels, **{**TINY, **changes})
    net.train()
    with torch.no_grad():
        net(torch.rand(8, channels, resolution, resolution))  # running statistics, and res_elu's first scales
    return net.eval().requires_grad_(False)


def images(n: int = 4, channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (n, channels, 8, 8), generator=torch.Generator().manual_seed(1)) / 255


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(arch):
    """Every kind of cell: shapes, finite numbers, the same result twice."""
    net, x = tiny(arch_instance=arch, num_nf=1), images()
    noise = [torch.randn(4, *shape) for shape in net.latent_shapes]
    out = net(x, noise)
    assert out.logits.shape == (4, net.decoder.logit_channels, 8, 8)
    assert out.kl_all.shape == (4, 4) and out.kl_diag.shape == (4, 3)
    assert out.log_q.shape == out.log_p.shape == (4,)
    assert all(value.isfinite().all() for value in out)
    assert all(torch.equal(a, b) for a, b in zip(out, net(x, noise), strict=True))
    assert net.sample(2).isfinite().all()


@pytest.mark.parametrize(
    "changes", [{}, {"num_nf": 2}, {"res_dist": False}, dict(num_latent_scales=1, num_groups_per_scale=1)]
)
def test_kl_terms_belong_together(changes):
    net, x = tiny(**changes), images()
    out = net(x)
    assert torch.allclose(out.kl_diag.sum(dim=1), out.kl_all.mean(dim=0), rtol=1e-4, atol=1e-4)
    if changes.get("num_nf"):
        assert torch.allclose(out.kl_all.sum(dim=1), out.log_q - out.log_p, rtol=1e-4, atol=1e-2)
    else:  # the mean of many draws of log q - log p is the divergence
        assert (out.kl_all >= 0).all()
        features = net.encode(x[:1])
        many = net.decode(features, repeat=2000)
        top = many.kl_all[:, 0]
        assert torch.allclose(top, top[:1].expand(2000))


def test_an_image_depends_on_its_seed_alone():
    net = tiny(num_nf=1)
    together = net.sample(3, 0.8, StackedRandomGenerator("cpu", [5, 6, 7]).randn_like)
    alone = net.sample(1, 0.8, StackedRandomGenerator("cpu", [6]).randn_like)
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    x = images(3)
    out = net(x, StackedRandomGenerator("cpu", [5, 6, 7]).randn_like)
    single = net(x[1:2], StackedRandomGenerator("cpu", [6]).randn_like)
    assert torch.allclose(out.logits[1:2], single.logits, atol=1e-5)
    assert torch.allclose(out.kl_all[1:2], single.kl_all, atol=1e-4)


def test_temperature():
    """It multiplies the standard deviations of all priors: at 0.0001, all samples are nearly the same."""
    net = tiny()
    cold, warm = (net.sample(16, t).std(dim=0).mean() for t in (1e-4, 1))
    assert cold < 1e-3 * warm


@pytest.mark.parametrize("num_nf", [0, 1])
def test_prior_draws_reconstruct(num_nf):
    net, x = tiny(num_nf=num_nf), images()
    noise = [torch.randn(4, *shape) for shape in net.latent_shapes]
    draws = net.prior_draws(x, noise)
    assert torch.allclose(net.sample(4, noise=draws), net(x, noise).logits, atol=1e-4)


def test_repeated_draws():
    """Several draws of an image together are what they are one by one."""
    net, x = tiny(num_nf=1), images(2)
    noise = [[torch.randn(2, *shape) for shape in net.latent_shapes] for _ in range(3)]
    together = net.decode(
        net.encode(x), [torch.stack(n, dim=1).flatten(0, 1) for n in zip(*noise, strict=True)], repeat=3
    )
    for k in range(3):
        one = net(x, noise[k])
        for name in ("logits", "log_q", "log_p", "kl_all"):
            assert torch.allclose(getattr(together, name)[k::3], getattr(one, name), atol=1e-4, rtol=1e-5), name


def test_weights_shared_by_accumulation_rounds():
    """Gradients of two backward passes inside `effective_weights` are those outside."""
    net, x = tiny(num_nf=1).requires_grad_(), images()
    noise = [torch.randn(2, *shape) for shape in net.latent_shapes]

    def backward():
        for part in x.chunk(2):
            net(part, noise).kl_all.mean().backward()

    backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    with effective_weights(net):
        backward()
    actual = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert actual.keys() >= expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, grad in expected.items():
        assert torch.allclose(actual[name], grad, atol=1e-6 * float(largest)), name
    assert all(conv.shared_weight is None for conv in net.modules() if isinstance(conv, Conv2d))


def test_stride_two_skip_at_64():
    """The weight gradient of a 1x1 convolution of stride 2 with the channels last ended the process here."""
    skip = SkipDown(5, 10)
    for _ in range(20):
        x = torch.randn(2, 5, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
        skip(x).sum().backward()
    assert skip.conv_1.weight.grad.isfinite().all()


def test_batch_norm_is_torchs():
    ours, theirs = BatchNorm2d(4), torch.nn.BatchNorm2d(4, momentum=0.05)
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize(("height", "width", "k"), [(8, 8, 5), (2, 2, 5), (4, 8, 3), (1, 1, 5), (3, 5, 11)])
def test_depthwise_convolutions_of_small_images(height, width, k):
    """The same as torch's, with its gradients."""
    rnd = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(6, 7, height, width, generator=rnd).contiguous(memory_format=torch.channels_last) for _ in "ab"
    )
    conv = Conv2d(7, 7, k, groups=7, bias=False, weight_norm=False)
    x.requires_grad_()
    assert nvae_cpu.suits(x, conv.weight, 1, 1) and not nvae_cpu.suits(x, conv.weight, 2, 1)
    conv(x).backward(grad)
    w = conv.weight.detach().clone().requires_grad_()
    y = x.detach().clone().requires_grad_()
    F.conv2d(y, w, padding=k // 2, groups=7).backward(grad)
    torch.testing.assert_close(conv.weight.grad, w.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_groups_per_scale():
    assert groups_per_scale(3, 20, True) == [20, 10, 5]
    assert groups_per_scale(5, 16, True, 4) == [16, 8, 4, 4, 4]
    assert groups_per_scale(2, 7, False) == [7, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(resolution=12), "cannot be halved"),
        (dict(arch_instance="res_none"), "res_none"),
        (dict(decoder="bernoulli"), "one channel"),
        (dict(decoder="none"), "one of bernoulli"),
        (dict(channels=2), "one or three channels"),
        (dict(num_postprocess_blocks=2), "must be equal"),
        (dict(num_latent_scales=1, num_groups_per_scale=1, num_channels_enc=4), "one group"),
        (dict(arch_instance="mbconv_den", num_channels_enc=3), "groups"),
    ],
)
def test_options_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**{"num_latent_scales": 3, **changes} if "resolution" in changes else changes)


# ---------------------------------------------------------------------------------------------------------
# Decoders


def every_level(levels: int, channels: int) -> torch.Tensor:
    return (torch.arange(levels) / (levels - 1)).reshape(-1, 1, 1, 1).expand(-1, channels, 1, 1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("levels", [17, 32, 256])
def test_probabilities_sum_to_one(levels, scale):
    """Over the levels of a pixel; the wide range of logits covers narrow, wide and far distributions."""
    rnd = torch.Generator().manual_seed(levels)
    x = every_level(levels, 1)
    for decoder in (LogisticMixtureDecoder(1, 3, levels), NormalDecoder(1, levels)):
        logits = scale * torch.randn(20, decoder.logit_channels, 1, 1, generator=rnd)
        for pixel in logits.split(1):
            log_prob = decoder.log_prob(pixel.expand(levels, -1, -1, -1).double(), x)
            assert log_prob.exp().sum() == pytest.approx(1, abs=2e-3)
    published = LogisticMixtureDecoder(1, 1, 256, published=True)
    logits = torch.tensor([0, 0.95, -3.0]).reshape(1, 3, 1, 1).expand(256, -1, -1, -1)
    assert published.log_prob(logits, every_level(256, 1)).exp().sum() == pytest.approx(1.284, abs=1e-3)


def test_colours_condition_each_other():
    """Over all triples of 4 levels, the probabilities of an RGB pixel sum to 1."""
    decoder = LogisticMixtureDecoder(3, 2, levels=4)
    grid = torch.cartesian_prod(*[torch.arange(4) / 3] * 3).reshape(-1, 3, 1, 1)
    logits = torch.randn(1, decoder.logit_channels, 1, 1, generator=torch.Generator().manual_seed(0))
    assert decoder.log_prob(logits.expand(len(grid), -1, -1, -1), grid).exp().sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "decoder", [LogisticMixtureDecoder(1, 2), NormalDecoder(1), LogisticMixtureDecoder(3, 2), BernoulliDecoder()]
)
def test_likelihoods_far_out(decoder):
    """Finite values and gradients for logits that are far off."""
    channels = getattr(decoder, "channels", 1)
    for size in (1e-3, 10.0, 1e3):
        logits = (size * torch.randn(64, decoder.logit_channels, 2, 2)).requires_grad_()
        x = torch.randint(decoder.levels, (64, channels, 2, 2)) / (decoder.levels - 1)
        log_prob = decoder.log_prob(logits, x)
        assert log_prob.isfinite().all() and (log_prob < 1e-4).all()
        log_prob.sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("decoder", [LogisticMixtureDecoder(1, 3), NormalDecoder(1), BernoulliDecoder()])
def test_samples_follow_the_likelihood(decoder):
    """The mean of drawn values is that of the probabilities, within five standard errors."""
    logits = torch.randn(1, decoder.logit_channels, 1, 1, generator=torch.Generator().manual_seed(3)) - 1
    levels = every_level(decoder.levels, 1)
    p = decoder.log_prob(logits.expand(len(levels), -1, -1, -1), levels).exp().flatten()
    mean = (p * levels.flatten()).sum()
    many = logits.expand(20000, -1, -1, -1)
    drawn = decoder.sample(many, decoder.draws(many)).flatten()
    deviation = ((p * levels.flatten() ** 2).sum() - mean**2).sqrt()
    assert abs(drawn.mean() - mean) < 5 * deviation / math.sqrt(20000) + 1e-3


@pytest.mark.parametrize("decoder", [LogisticMixtureDecoder(3, 2), NormalDecoder(3), BernoulliDecoder()])
def test_lower_temperature_is_quieter(decoder):
    logits = torch.randn(1, decoder.logit_channels, 4, 4).expand(500, -1, -1, -1)
    draws = decoder.draws(logits)
    spread = [decoder.sample(logits, draws, t).std(dim=0).mean() for t in (0.3, 1.0)]
    assert spread[0] < spread[1]
