"""Adapters: the calls of k-diffusion and deepinv, with those packages where they are installed."""

import pytest
import torch
from conftest import tiny_network

from training.adapters import ForDeepInverse, ForKDiffusion, OfKDiffusion
from training.samplers.edm import ode_sampler
from training.samplers.grids import edm_sigmas


@pytest.fixture(scope="module")
def net():
    return tiny_network()


def conditions(n: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(n) % 10, 10).float()


def test_a_sampler_of_k_diffusions_kind(net):
    """Its call: model(x, sigma * s_in, **extra_args). Euler's method written so is ours."""
    model, noise, cond, sigmas = ForKDiffusion(net), torch.randn(3, 1, 8, 8), conditions(3), edm_sigmas(6)
    x, s_in, extra_args = noise * sigmas[0].item(), noise.new_ones([3]), {"cond": cond}
    for sigma, sigma_next in zip(sigmas[:-1].float(), sigmas[1:].float(), strict=True):
        denoised = model(x, sigma * s_in, **extra_args)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    torch.testing.assert_close(x, ode_sampler(net, noise, sigmas, cond, solver="euler"), rtol=1e-4, atol=1e-4)
    assert (model.sigma_min, model.sigma_max) == (
        getattr(net, "sigma_min", 0.0),
        getattr(net, "sigma_max", float("inf")),
    )


def test_other_arguments_are_refused(net):
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    with pytest.raises(TypeError, match="unknown argument 'cond_scale': this denoiser takes 'class_cond' alone"):
        ForKDiffusion(net, "class_cond")(x, sigma, cond_scale=2)
    torch.testing.assert_close(
        ForKDiffusion(net, "class_cond")(x, sigma, class_cond=conditions(2)), net(x, sigma, conditions(2))
    )


def test_a_model_of_k_diffusions_kind():
    """It gets a level per image, in the type of the images, and its condition by keyword, if there is one."""
    seen = []

    class Model(torch.nn.Module):
        sigma_min, sigma_max = torch.tensor(0.1), torch.tensor(10.0)

        def forward(self, x, sigma, **kwargs):
            seen.append((sigma, kwargs))
            return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    D = OfKDiffusion(Model(), "class_cond")
    assert (D.sigma_min, D.sigma_max) == pytest.approx((0.1, 10)) and OfKDiffusion(
        Model(), sigma_max=5.0
    ).sigma_max == 5
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(D(x, torch.tensor(2.0, dtype=torch.float64)), x / 5)
    D(x, torch.tensor([1.0, 2.0, 3.0]), conditions(3))
    assert [sigma.tolist() for sigma, _ in seen] == [[2, 2, 2], [1, 2, 3]] and seen[0][0].dtype == torch.float32
    assert seen[0][1] == {} and seen[1][1]["class_cond"].shape == (3, 10)
    # Data from N(0, 1): the flow takes noise to draws of it.
    samples = ode_sampler(D, torch.randn(500, 1, 8, 8), edm_sigmas(40, sigma_min=0.1, sigma_max=10), solver="heun")
    assert samples.std().item() == pytest.approx(1, rel=0.02)


def test_there_and_back(net):
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 4.0])
    assert torch.equal(OfKDiffusion(ForKDiffusion(net))(x, sigma, conditions(2)), net(x, sigma, conditions(2)))


@pytest.mark.parametrize("sigma", [0.1, torch.tensor(0.1), torch.tensor([0.1, 0.1]), torch.full([2, 1, 1, 1], 0.1)])
def test_pixels_from_0_to_1(net, sigma):
    """denoiser(x, sigma): x = (x_ours + 1) / 2 has half of the noise."""
    x = torch.rand(2, 1, 8, 8)
    found = ForDeepInverse(net, cond=conditions(1))(x, sigma)
    expected = net(2 * x - 1, torch.tensor(0.2), conditions(1).expand(2, -1))
    torch.testing.assert_close(found, (expected + 1) / 2)
    assert torch.equal(ForDeepInverse(net, (0.0, 1.0))(x, 0.2), net(x, torch.tensor([0.2])))


def test_the_range_is_that_of_the_network():
    class Unit(torch.nn.Module):
        def forward(self, x, sigma, cond=None):
            return x - sigma.reshape(-1, 1, 1, 1)

    net = Unit()
    net.spec = type("Spec", (), {"pixel_range": (0.0, 4.0)})()
    torch.testing.assert_close(ForDeepInverse(net)(torch.full([1, 1, 2, 2], 0.5), 0.1), torch.full([1, 1, 2, 2], 0.4))


def test_with_k_diffusion(net):
    sampling = pytest.importorskip("k_diffusion.sampling")
    noise, cond, sigmas = torch.randn(2, 1, 8, 8), conditions(2), edm_sigmas(5)
    x = sampling.sample_heun(ForKDiffusion(net), noise * sigmas[0].item(), sigmas.float(), {"cond": cond}, disable=True)
    torch.testing.assert_close(x, ode_sampler(net, noise, sigmas, cond), rtol=1e-4, atol=1e-4)


def test_with_deepinv(net):
    """A plug-and-play prior calls the denoiser with its sigma."""
    deepinv = pytest.importorskip("deepinv")
    x, denoiser = torch.rand(2, 1, 8, 8), ForDeepInverse(net)
    prior = deepinv.optim.prior.PnP(denoiser=denoiser)
    torch.testing.assert_close(prior.prox(x, 0.1), denoiser(x, 0.1))
    score = deepinv.optim.prior.ScorePrior(denoiser=denoiser)
    torch.testing.assert_close(score.grad(x, 0.1), (x - denoiser(x, 0.1)) / 0.1**2)
