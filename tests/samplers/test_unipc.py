"""UniPC: orders of accuracy, evaluations, and what it shares with other solvers."""

import math

import pytest
import torch
from gaussian import FIRST, LAST, Gaussian, even_grid, exact, run, start

from training.config.samplers import SamplerConfig
from training.config.unipc import UniPC
from training.samplers.coefficients import dpmpp_2m, dpmpp_3m
from training.samplers.grids import Grid, edm_sigmas
from training.samplers.unipc import coefficients, unipc

ALL = [
    UniPC(order=order, prediction=prediction, B=B, corrector=corrector)
    for order in (1, 2, 3)
    for prediction in ("data", "noise")
    for B in ("B1", "B2")
    for corrector in (False, True)
]


@pytest.mark.parametrize("options", [o for o in ALL if o.order < 3 or o.B == "B2"], ids=repr)
def test_order(options):
    """UniP-p is of order p, and UniC-p makes it p + 1.

    The first steps are of lower order. Their errors are small, where sigma is large, and show with shorter steps only.
    """
    x, errors = start(), []
    for n in (384, 768):
        out = run(unipc, x, even_grid(n), options)
        errors.append((out - exact(x, FIRST, LAST)).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(options.order + options.corrector, abs=0.25)


@pytest.mark.parametrize("options", ALL, ids=repr)
@pytest.mark.parametrize("steps", range(1, 6))
def test_evaluations(options, steps):
    """One per step, at the level where it begins."""
    for grid in (even_grid(steps), Grid(edm_sigmas(steps))):
        D, levels = Gaussian(), []
        out = run(unipc, start(), grid, options, D, lambda x, sigma, _, seen=levels: seen.append(sigma) or x)
        assert torch.equal(torch.stack(D.sigmas), grid.sigmas[:-1]) and out.isfinite().all()
        assert torch.equal(torch.stack(levels), grid.sigmas[1:])


def test_predictors_are_those_of_dpm_solver():
    sigmas, sigma_next = [1.5, 2.2, 2.7], 1.1
    assert coefficients(sigmas, sigma_next, UniPC()) == pytest.approx(dpmpp_3m(sigmas, sigma_next))
    assert coefficients(sigmas[:2], sigma_next, UniPC(B="B2")) == pytest.approx(dpmpp_2m(sigmas[:2], sigma_next))


@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_B_of_a_corrector_with_one_difference(prediction):
    """a_1 = 1/2: the value at the end of the step gets B(h) / 2."""
    h = math.log(1.5)
    B2 = -math.expm1(-h) if prediction == "data" else math.expm1(h)
    for B, value in {"B1": h, "B2": B2}.items():
        begin, end = coefficients([1.5, 1.0], 1.0, UniPC(B=B, prediction=prediction))
        sign = 1 if prediction == "data" else -1
        assert (begin + end, end) == pytest.approx((sign * B2, sign * value / 2))


@pytest.mark.parametrize("options", ALL, ids=repr)
def test_a_clean_end_is_the_denoised_image(options):
    fixed = start(seed=1)
    out = run(unipc, start(), Grid(edm_sigmas(7)), options, lambda x, sigma: fixed)
    torch.testing.assert_close(out, fixed, rtol=1e-12, atol=1e-12)


def test_equal_levels_are_one():
    grid = even_grid(6)
    doubled = Grid(torch.cat([grid.sigmas[:3], grid.sigmas[2:]]))
    torch.testing.assert_close(run(unipc, start(), doubled, UniPC()), run(unipc, start(), grid, UniPC()))


def test_its_description_names_its_own_options():
    facts = SamplerConfig(solver="unipc", unipc=UniPC(order=2, B="B1")).describe()
    assert (facts["order"], facts["B"], facts["prediction"], facts["corrector"]) == (2, "B1", "data", True)
