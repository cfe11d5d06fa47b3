"""Rules of guidance against the equations of their papers."""

import pytest
import torch

from training.config.guidance import APG, GuidanceConfig
from training.config.samplers import GridConfig, SamplerConfig
from training.guidance import GuidedDenoiser, guided
from training.guidance.rules import Momentum, Projected, extrapolated, scaled_guide
from training.samplers import Sampler
from training.samplers.grids import edm_sigmas

LEVELS = edm_sigmas(6)
SIGMA = torch.tensor(0.7, dtype=torch.float64)


def images(n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def flat_dot(a, b):
    return torch.einsum("nchw,nchw->n", a, b).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("rule", [extrapolated, Projected(), Projected(0.3, 1.0, -0.5), scaled_guide])
def test_weight_1_is_the_main_denoiser(rule):
    main, guide, x = images()
    torch.testing.assert_close(rule(main, guide, 1.0, x, SIGMA), main)


@pytest.mark.parametrize("rule", [extrapolated, Projected(0.3, 1.0), scaled_guide])
def test_images_of_a_batch_have_their_own_weights_and_levels(rule):
    main, guide, x = images()
    weight, sigma = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64), torch.tensor([0.1, 1.0, 9.0])
    together = rule(main, guide, weight.reshape(-1, 1, 1, 1), x, sigma)
    for i in range(3):
        part = slice(i, i + 1)
        torch.testing.assert_close(rule(main[part], guide[part], weight[i].item(), x[part], sigma[i]), together[part])


def test_all_of_apg_left_out_is_guidance():
    main, guide, x = images()
    torch.testing.assert_close(Projected(eta=1.0)(main, guide, 3.0, x, SIGMA), extrapolated(main, guide, 3.0, x, SIGMA))


def test_apg_projects():
    """What is added is orthogonal to the image; of the rest, a share of eta comes back."""
    main, guide, x = images()
    added = Projected()(main, guide, 3.0, x, SIGMA) - main
    torch.testing.assert_close(flat_dot(added, main), torch.zeros(3, 1, 1, 1, dtype=torch.float64), rtol=0, atol=1e-12)
    parallel = flat_dot(main - guide, main) / flat_dot(main, main) * main
    torch.testing.assert_close(added, 2 * (main - guide - parallel))
    torch.testing.assert_close(Projected(eta=0.4)(main, guide, 3.0, x, SIGMA) - main, added + 2 * 0.4 * parallel)


def test_apg_limits_the_norm():
    main, guide, x = images()
    guide[0] = main[0] + 1e-3 * guide[0]  # near enough for the limit
    length = flat_dot(main - guide, main - guide).sqrt()
    limited = Projected(eta=1.0, norm=0.5)(main, guide, 2.0, x, SIGMA) - main
    assert length[0] < 0.5 < length[1:].min()
    torch.testing.assert_close(limited[0], (main - guide)[0])
    torch.testing.assert_close(flat_dot(limited, limited).sqrt()[1:], torch.full_like(length[1:], 0.5))


def test_momentum_counts_each_level_once():
    one, two, three = images()
    momentum = Momentum(-0.5)
    # Heun's method: the end of a step, and the beginning of the next one, at the same level.
    assert torch.equal(momentum(one, 8.0), one)
    torch.testing.assert_close(momentum(two, 4.0), two - 0.5 * one)
    torch.testing.assert_close(momentum(three, 4.0), three - 0.5 * one)
    torch.testing.assert_close(momentum(one, 2.0), one - 0.5 * (three - 0.5 * one))
    # With churn, a step begins above the level where the last one has ended.
    torch.testing.assert_close(momentum(two, 2.1), two - 0.5 * (three - 0.5 * one))


@pytest.mark.parametrize("solver", ["heun", "euler", "sqrt-3m"])
def test_momentum_of_a_sampler(solver):
    """Once per step, and from nothing in each batch."""
    config = GuidanceConfig(guidance=2.0, guidance_method="apg", apg=APG(eta=1.0, momentum=-0.5))
    noise = torch.ones(2, 1, 2, 2)
    grid = SamplerConfig(solver=solver, grid=GridConfig(num_steps=6))
    sampler, seen = Sampler(grid), []

    def watched(x, sigma, labels=None):
        seen.append((sigma.item(), D(x, sigma)[0, 0, 0, 0].item()))
        return torch.zeros_like(x)

    def batch():
        nonlocal D
        seen.clear()
        # Of the image 1 and the guide's 0, the difference is 1: with momentum 1, 1/2, 3/4, 5/8, ... of each level.
        D = guided(lambda x, sigma, labels: torch.ones_like(x), lambda x, sigma, labels: torch.zeros_like(x), config,
                   sampler.grid.sigmas)  # fmt: skip
        sampler(watched, noise)
        return list(seen)

    D = None
    first = batch()
    assert batch() == first
    sums, previous = {}, 0.0
    for step, level in enumerate(sampler.grid.sigmas[:-1].tolist()):
        sums[level] = 1 - 0.5 * sums[previous] if step else 1.0
        previous = level
    assert dict(first) == pytest.approx({level: 1 + total for level, total in sums.items()})
    assert [value for _, value in first] == pytest.approx([1 + sums[level] for level, _ in first])


def test_cfg_plus_plus_is_the_published_step():
    """x' = D_lambda + sigma' (x - D_0) / sigma, at every step of Euler's method."""

    def main(x, sigma, labels=None):
        return 0.6 * x / (1 + sigma.to(x) ** 2) + 0.2

    def guide(x, sigma, labels=None):
        return 0.5 * x / (1 + sigma.to(x) ** 2)

    scale = 0.6
    config = GuidanceConfig(guidance=scale, guidance_method="cfg++")
    sampler = Sampler(SamplerConfig(solver="euler", grid=GridConfig(num_steps=6)))
    noise = images()[0]
    found = sampler(guided(main, guide, config, sampler.grid.sigmas), noise, dtype=torch.float64)
    x = noise * LEVELS[0]
    for sigma, sigma_next in zip(LEVELS[:-1], LEVELS[1:], strict=True):
        x = x.float().double()  # as denoisers get it
        D1, D0 = main(x, sigma), guide(x, sigma)
        x = D0 + scale * (D1 - D0) + sigma_next * (x - D0) / sigma
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, sampler(GuidedDenoiser(main, guide, scale), noise, dtype=torch.float64), atol=1e-2)


def test_cfg_zero_is_the_published_velocity():
    """v = (1 - w) s v_0 + w v_1 in the flow u = (1 - t) x0 + t n, where u = (1 - t) x and sigma = t / (1 - t)."""
    main, guide, x = images()
    t, weight = SIGMA / (1 + SIGMA), 2.5

    def velocity(D):  # n - x0, of u = (1 - t) x0 + t n
        u = (1 - t) * x
        return (u - (1 - t) * D) / t - D

    v1, v0 = velocity(main), velocity(guide)
    s = flat_dot(v1, v0) / flat_dot(v0, v0)
    expected = (1 - weight) * s * v0 + weight * v1
    torch.testing.assert_close(velocity(scaled_guide(main, guide, weight, x, SIGMA)), expected)
    # A guide that is right but for the length of its velocity does not count.
    parallel = (x - SIGMA * 0.3 * v1) / (1 + SIGMA)  # its velocity is 0.3 v1
    torch.testing.assert_close(scaled_guide(main, parallel, weight, x, SIGMA), main)


@pytest.mark.parametrize("steps", [0, 2])
def test_zero_init_leaves_the_flow_where_it_is(steps):
    """In the first steps u = x / (1 + sigma) does not move."""
    config = GuidanceConfig(guidance=2.0, guidance_method="cfg-zero", zero_init_steps=steps)
    main, guide, noise = images()
    asked = []

    def net(x, sigma, labels=None):
        asked.append(sigma.item())
        return main.float()

    sampler = Sampler(SamplerConfig(solver="euler", grid=GridConfig(num_steps=6)))
    states = []
    D = guided(net, lambda x, sigma, labels: guide.float(), config, sampler.grid.sigmas)
    sampler(D, noise, on_step=states.append, dtype=torch.float64)
    u = [x / (1 + sigma) for x, sigma in zip(states, LEVELS, strict=True)]
    for k in range(1, 4):
        assert torch.allclose(u[k], u[0], atol=1e-4) == (k <= steps)
    assert asked == LEVELS[steps:-1].tolist()
