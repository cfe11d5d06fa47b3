"""Solvers, guidance and random numbers."""

import math

import pytest
import torch

from training.config.samplers import LEVEL_SOLVERS, SOLVERS
from training.guidance import GuidedDenoiser
from training.samplers.coefficients import MULTISTEP
from training.samplers.edm import edm_sampler, ode_sampler
from training.samplers.grids import edm_sigmas
from training.samplers.noise import StackedRandomGenerator

MEAN, STD = 0.3, 0.5


def gaussian(x, sigma, labels=None):
    """The exact denoiser of data distributed as N(MEAN, STD^2)."""
    sigma = sigma.to(x.dtype)
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def exact_solution(noise, sigma_max):
    """Where the probability flow takes `noise * sigma_max` for `gaussian`."""
    return MEAN + (noise * sigma_max - MEAN) * STD / math.sqrt(STD**2 + sigma_max**2)


def noise(n=64, seed=0):
    return torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Float64Denoiser:
    """`gaussian` in float64: the solver hands over float32, whose rounding would hide the order."""

    def __call__(self, x, sigma, labels=None):
        return gaussian(x.double(), sigma)


@pytest.mark.parametrize(
    ("solver", "slope"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2), ("dpmpp-3m", 3), ("sqrt-3m", 3)]
)
def test_order_of_accuracy(solver, slope):
    # Down to sigma_min, the error there falls as steps^-order.
    steps, errors = [64, 128, 256], []
    scale = math.sqrt((STD**2 + 0.002**2) / (STD**2 + 80**2))
    for n in steps:
        sigmas = edm_sigmas(n)[:-1]  # stop at sigma_min
        x = ode_sampler(Float64Denoiser(), noise(), sigmas, solver=solver, dtype=torch.float64)
        errors.append((x - (MEAN + (noise() * 80 - MEAN) * scale)).abs().mean().item())
    measured = -torch.tensor(errors).log().diff() / math.log(2)
    assert measured[-1].item() == pytest.approx(slope, abs=0.1), measured


def test_every_solver_is_tested():
    elsewhere = {"dpm-single", "dpm-multi", "dpm-adaptive", "unipc", "euler-maruyama", "pc", "rk45", "consistency"}
    assert set(SOLVERS) == {"euler", "heun", "dpmpp-2m", "dpmpp-3m", "sqrt-3m"} | elsewhere


def test_coefficients():
    # DPM-Solver++(2M) with r = 1/2: e^-h x + (1 - e^-h) (2 D_0 - D_1).
    assert MULTISTEP["dpmpp-2m"].coefficients([2, 3.0], 2 * (2 / 3) ** 2) == pytest.approx([10 / 9, -5 / 9])
    # What the polynomial can represent is integrated exactly: int_0^h e^(s-h) f(s) ds, with D_j = f(s_j).
    sigmas, sigma_next = [1.5, 2.2, 2.7], 1.1
    h = math.log(1.5 / 1.1)
    weights = MULTISTEP["dpmpp-3m"].coefficients(sigmas, sigma_next)
    squares = [math.log(sigma / 1.5) ** 2 for sigma in sigmas]  # s^2
    assert sum(w * v for w, v in zip(weights, squares, strict=True)) == pytest.approx(h**2 - 2 * h + 2 - 2 * 1.1 / 1.5)
    weights = MULTISTEP["sqrt-3m"].coefficients(sigmas, sigma_next)
    assert sum(w * v for w, v in zip(weights, sigmas, strict=True)) == pytest.approx(1.1 * h)  # sigma
    for solver in MULTISTEP.values():
        assert sum(solver.coefficients([1.5], 1.1)) == pytest.approx(1 - 1.1 / 1.5)  # the first step


@pytest.mark.parametrize("solver", [*LEVEL_SOLVERS, "dpm-single"])
def test_every_solver_ends_in_the_denoised_image(solver):
    x = edm_sampler(gaussian, noise().float(), num_steps=1, solver=solver)
    rounding = dict(rtol=0, atol=80 * 2 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(x, gaussian(noise().float() * 80, torch.tensor(80.0)), **rounding)
    # A clean image that does not change is reached exactly, whatever the steps.
    fixed = noise(seed=1).float()
    x = edm_sampler(lambda x, sigma, labels: fixed, noise().float(), num_steps=7, solver=solver)
    torch.testing.assert_close(x, fixed, **rounding)


@pytest.mark.parametrize("solver", [*LEVEL_SOLVERS, "dpm-single"])
def test_every_solver_takes_guidance_and_labels(solver):
    def conditional(x, sigma, labels):
        return gaussian(x, sigma) + labels.reshape(-1, 1, 1, 1)

    def run(steps, guidance=2, solver=solver):
        labels = torch.linspace(0, 1, 64)
        return edm_sampler(conditional, noise().float(), labels, gaussian, steps, guidance=guidance, solver=solver)

    exact = run(512, solver="dpmpp-3m")
    error, coarser = ((run(steps) - exact).abs().mean() for steps in (128, 32))
    assert error < coarser / 3  # 4 for Euler, 16 and more for the others
    assert (run(128) - run(128, guidance=1)).abs().mean() > 0.1


@pytest.mark.parametrize("solver", MULTISTEP)
def test_equal_noise_levels_are_one(solver):
    x = edm_sampler(gaussian, noise().float(), num_steps=5, sigma_min=3, sigma_max=3, solver=solver)
    torch.testing.assert_close(x, edm_sampler(gaussian, noise().float(), num_steps=1, sigma_max=3))


def test_samples_of_a_gaussian():
    x = edm_sampler(gaussian, noise().float(), num_steps=128)
    torch.testing.assert_close(x, exact_solution(noise(), 80).float(), rtol=0, atol=2e-3)


def test_churn_keeps_the_distribution():
    torch.manual_seed(0)
    x = edm_sampler(gaussian, torch.randn(20000, 1, 1, 1), num_steps=64, S_churn=20, S_noise=1)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)


def test_churn_acts_in_its_range_only():
    plain = edm_sampler(gaussian, noise().float(), num_steps=8)
    outside = edm_sampler(gaussian, noise().float(), num_steps=8, S_churn=10, S_min=100)
    assert torch.equal(plain, outside)
    inside = edm_sampler(gaussian, noise().float(), num_steps=8, S_churn=10)
    assert not torch.equal(plain, inside)


@pytest.mark.parametrize("solver", [*LEVEL_SOLVERS, "dpm-single"])
def test_number_of_evaluations(solver):
    calls = []

    def denoiser(x, sigma, labels):
        calls.append(float(sigma))
        return x

    edm_sampler(denoiser, noise().float(), num_steps=5, solver=solver)
    assert len(calls) == (2 * 5 - 1 if solver == "heun" else 5)


def test_guidance_extrapolates():
    guided = GuidedDenoiser(lambda x, s, c: x * 2, lambda x, s, c: x * 1, guidance=3)
    x = noise().float()
    torch.testing.assert_close(guided(x, torch.tensor(1.0)), x * 4)


def test_no_guidance_is_the_main_network():
    x = noise().float()
    plain = edm_sampler(gaussian, x, num_steps=6)
    assert torch.equal(plain, edm_sampler(gaussian, x, gnet=lambda *a: 1 / 0, num_steps=6, guidance=1))


def test_guidance_interval():
    calls = []

    def guide(x, sigma, labels=None):
        calls.append(sigma)
        return x

    guided = GuidedDenoiser(lambda x, s, c: x * 2, guide, guidance=2, interval=(0.5, 2))
    x = torch.ones(4, 1, 1, 1)
    for sigma in (0.5, 2.001):
        assert torch.equal(guided(x, torch.tensor(sigma)), x * 2)
    assert calls == []  # outside, the guide is not even evaluated
    assert torch.equal(guided(x, torch.tensor(2.0)), x * 3)
    mixed = guided(x, torch.tensor([0.1, 1, 2, 3]))
    assert mixed.flatten().tolist() == [2, 3, 3, 2]


def test_interval_through_the_sampler():
    def guide(x, s, c):
        return gaussian(x, s) - 0.1

    x = noise().float()
    everywhere = edm_sampler(gaussian, x, gnet=guide, guidance=2, num_steps=8)
    inside = edm_sampler(gaussian, x, gnet=guide, guidance=2, num_steps=8, guidance_interval=(0.1, 1))
    nowhere = edm_sampler(gaussian, x, gnet=guide, guidance=2, num_steps=8, guidance_interval=(100, 101))
    assert torch.equal(nowhere, edm_sampler(gaussian, x, num_steps=8))
    assert not torch.equal(inside, nowhere)
    assert not torch.equal(inside, everywhere)


def test_bad_arguments():
    x = noise().float()
    with pytest.raises(ValueError, match="needs a guiding network"):
        edm_sampler(gaussian, x, guidance=2)
    with pytest.raises(ValueError, match="unknown sampler 'rk4'"):
        edm_sampler(gaussian, x, solver="rk4")
    for solver in MULTISTEP:
        with pytest.raises(ValueError, match=f"S_churn=5 adds noise, which {solver} cannot follow"):
            edm_sampler(gaussian, x, S_churn=5, solver=solver)
    with pytest.raises(ValueError, match="lo < hi"):
        edm_sampler(gaussian, x, gnet=gaussian, guidance=2, guidance_interval=(2, 1))
    for kwargs in [dict(num_steps=0), dict(sigma_min=0), dict(sigma_min=2, sigma_max=1), dict(rho=0)]:
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            edm_sigmas(**kwargs)


def test_grid():
    sigmas = edm_sigmas(32)
    assert len(sigmas) == 33
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert edm_sigmas(1).tolist() == [pytest.approx(80), 0]


def test_random_numbers_depend_on_the_seed_alone():
    together = StackedRandomGenerator("cpu", [3, 4, 5 + 2**32])
    alone = StackedRandomGenerator("cpu", [5])
    assert torch.equal(together.randn([3, 2, 4])[2:], alone.randn([1, 2, 4]))
    assert torch.equal(together.randint(10, [3, 6])[2:], alone.randint(10, [1, 6]))
    x = torch.zeros(1, 3, dtype=torch.float64)
    assert alone.randn_like(x).dtype == torch.float64
    assert alone.randn([1, 2], device="cpu").shape == (1, 2)
    with pytest.raises(AssertionError):
        together.randn([2, 4])
