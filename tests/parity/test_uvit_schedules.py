"""U-ViT's schedules and grids against the golden values (tolerances in the README of the golden files)."""

import pytest
import torch
from uvit_golden import GoldenFile, names

from training.schedules import VP
from training.schedules_uvit import CosineVP, InterpolatedVP

EXACT, DISCRETE, PUBLISHED = 1e-10, 1e-9, 1e-4
FILES = names("schedules*")


def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, absolute: float = 0) -> None:
    torch.testing.assert_close(actual, expected.double(), rtol=tolerance, atol=absolute)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("prefix", "schedule"), [("vp64", VP()), ("cosine64", CosineVP())])
def test_sde(name, prefix, schedule):
    g = GoldenFile(name)
    t = g.get(f"{prefix}/t", "t")
    assert t is not None
    alpha_bar = schedule.scale(t) ** 2
    check(alpha_bar, g[f"{prefix}/alpha_bar"], EXACT)
    check(schedule.std(t) ** 2, g[f"{prefix}/one_minus_alpha_bar"], EXACT)
    check(schedule.sigma(t) ** -2, g[f"{prefix}/snr"], EXACT)
    check(schedule.sigma(t) ** 2, g[f"{prefix}/nsr"], EXACT)
    check(schedule.diffusion(t), g[f"{prefix}/diffusion"], EXACT)
    if prefix == "vp64":
        check(schedule.beta(t), g["vp64/beta"], EXACT)
        check(schedule.label(t), g["vp64/label"], EXACT)
        check(schedule.integral(t).diff(), g["vp64/beta_integral_next"], EXACT)
    else:
        check(schedule.drift(t), g["cosine64/drift_at_x1"], EXACT)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("prefix", "schedule", "tolerance"),
    [
        ("solver_linear64", VP(), EXACT),
        ("pp_linear64", VP(), EXACT),
        ("solver_cosine64", CosineVP(), EXACT),
        ("pp_cosine64", CosineVP(), EXACT),
        ("discrete64", InterpolatedVP(), DISCRETE),
    ],
)
def test_solver_schedule(name, prefix, schedule, tolerance):
    g = GoldenFile(name)
    t = g[f"{prefix}/t"]
    check(schedule.scale(t).log(), g[f"{prefix}/log_alpha"], tolerance, absolute=1e-15)
    check(schedule.std(t), g[f"{prefix}/std"], tolerance)
    check(-schedule.sigma(t).log(), g[f"{prefix}/lambda"], tolerance, absolute=tolerance)
    check(schedule.time((-g[f"{prefix}/inv_in_lambda"]).exp()), g[f"{prefix}/inv_t"], tolerance, absolute=1e-12)
    # What the published scripts compute, in float32.
    published = prefix.replace("64", "32")
    check(schedule.scale(g[f"{published}/t"].double()), g[f"{published}/log_alpha"].double().exp(), PUBLISHED)


@pytest.mark.parametrize("name", FILES)
def test_steps(name):
    g = GoldenFile(name)
    schedule = InterpolatedVP()
    n = torch.arange(1, schedule.num_scales + 1)
    t = n / schedule.num_scales
    check(schedule.knots, g["discrete64/log_alpha_knots"], DISCRETE)
    check(schedule.scale(t.double()) ** 2, g["ddpm/alpha_bar_n0_1000"][1:], PUBLISHED)
    check(schedule.knots.mul(2).exp(), g["ddpm/alpha_bar_n0_1000"][1:], DISCRETE)
    check(-schedule.knots.mul(2).expm1(), g["ddpm/one_minus_alpha_bar_n0_1000"][1:], DISCRETE)
    check(-torch.cat([schedule.knots[:1], schedule.knots.diff()]).mul(2).expm1(), g["ddpm/betas_n1_1000"], DISCRETE)
