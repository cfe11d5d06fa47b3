"""Predictor-corrector samplers: what they do to normal data, whose ideal denoiser is known."""

import math

import pytest
import torch
from ideal import STD

from dnnlib.errors import UserError
from training.config.samplers import PredictorCorrector
from training.samplers.grids import sde_grid
from training.samplers.noise import StackedRandomGenerator
from training.samplers.predictor_corrector import CORRECTORS, PREDICTORS, predictor_corrector
from training.samplers.sampler import unchanged
from training.schedules import VE, VP, DiscreteVE, DiscreteVP, Schedule, SubVP

SCHEDULES = [VE(), VP(), SubVP()]


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The ideal denoiser of N(0, STD^2)."""
    return STD**2 / (STD**2 + sigma.to(x.dtype) ** 2) * x


def sample(
    schedule: Schedule,
    options: PredictorCorrector,
    noise: torch.Tensor,
    num_steps: int,
    D=gaussian,
    randn_like=torch.randn_like,
    end_time=None,
):
    """Samples from unit-variance noise."""
    grid = sde_grid(schedule, num_steps, end_time)
    assert grid.start is not None
    return predictor_corrector(D, noise * grid.start, grid, options, randn_like=randn_like, after_update=unchanged)


def one() -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.float64)


def normal(n: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
def test_probability_flow_is_of_first_order(schedule, predictor):
    options = PredictorCorrector(predictor=predictor, corrector="none", probability_flow=True)
    exact = schedule.prior_std * STD / math.hypot(STD * float(schedule.scale(1.0)), float(schedule.std(1.0)))
    errors = [abs(float(sample(schedule, options, one(), n, end_time=1e-7)) - exact) for n in (500, 1000, 2000)]
    slopes = -torch.tensor(errors).log().diff() / math.log(2)
    assert slopes[-1].item() == pytest.approx(1, abs=0.1), errors


@pytest.mark.parametrize(
    ("schedule", "predictor", "flow", "expected"),
    [
        (VE(), "reverse_diffusion", True, 0.508890),
        (VP(), "reverse_diffusion", True, 0.510575),
        (VE(), "euler_maruyama", False, 0.00466294),
        (VP(), "euler_maruyama", False, 0.00159914),
        (VE(), "ancestral_sampling", False, 0.00500124),
        (VP(), "ancestral_sampling", False, 0.00158935),
    ],
)
def test_figures_of_the_published_predictors(schedule, predictor, flow, expected):
    """Without noise: what 1000 published steps leave of the prior's standard deviation."""
    options = PredictorCorrector(predictor=predictor, corrector="none", probability_flow=flow)
    x = sample(schedule, options, one(), 1000, randn_like=torch.zeros_like)
    assert float(x) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "predictor"),
    [
        (schedule, predictor)
        for schedule in SCHEDULES
        for predictor in PREDICTORS
        if predictor != "none" and not (predictor == "ancestral_sampling" and isinstance(schedule, SubVP))
    ],
)
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_samples_have_the_law_of_the_data(schedule, predictor, corrector):
    torch.manual_seed(1)
    options = PredictorCorrector(predictor=predictor, corrector=corrector, snr=0.05)
    x = sample(schedule, options, normal(200, 1, 8, 8), 300)
    assert abs(float(x.mean())) < 5 * STD / x.numel() ** 0.5
    assert float(x.std()) == pytest.approx(STD, rel=0.03)


def variance(schedule: Schedule, predictor: str, num_steps: int) -> float:
    """Of samples of normal data, exactly: they are linear in the prior's draw and in the noise of each step."""
    step = 0

    def randn_like(x):
        nonlocal step
        step += 1
        return torch.eye(num_steps + 1, dtype=x.dtype)[step].reshape(x.shape)  # sample k: unit noise in step k alone

    prior = torch.eye(num_steps + 1, dtype=torch.float64)[0].reshape(-1, 1, 1, 1)
    options = PredictorCorrector(predictor=predictor, corrector="none")
    return float(sample(schedule, options, prior, num_steps, randn_like=randn_like, end_time=1e-7).square().sum())


@pytest.mark.parametrize(
    ("schedule", "predictor"),
    [
        (schedule, predictor)
        for schedule in [VE(1e-4, 10.0), VP(), SubVP()]
        for predictor in ["euler_maruyama", "reverse_diffusion", "ancestral_sampling"]
        if not (predictor == "ancestral_sampling" and isinstance(schedule, SubVP))
    ],
)
def test_law_of_samples_is_of_first_order(schedule, predictor):
    errors = [abs(variance(schedule, predictor, n) - STD**2) for n in (250, 500)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15), errors


@pytest.mark.parametrize("schedule", [VE(0.01, 2.0), VP(0.1, 0.9)], ids=repr)
@pytest.mark.parametrize("corrector", ["ald", "langevin"])
def test_stationary_law_of_correctors(schedule, corrector):
    """u + eta s + sqrt(2 eta) z with s = -u / V has the stationary variance V / (1 - eta / 2V).

    Of annealed Langevin dynamics eta = 2 alpha (r std)^2. The norms of Langevin dynamics follow u, so that there
    eta = 2 alpha r^2 V^2 / W with the stationary variance W itself, which is V (1 + alpha r^2).
    """
    torch.manual_seed(1)
    r, alpha = 0.4, 1.0 if isinstance(schedule, VE) else 1 - schedule.beta_min
    options = PredictorCorrector(predictor="none", corrector=corrector, n_steps_each=60, snr=r)
    x = sample(schedule, options, normal(200, 3, 16, 16), 1)
    std = float(schedule.std(1.0))
    V = (STD * float(schedule.scale(1.0))) ** 2 + std**2
    expected = V / (1 - alpha * (r * std) ** 2 / V) if corrector == "ald" else V * (1 + alpha * r**2)
    assert float(x.var()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_sample_depends_on_its_seed_alone(schedule, corrector):
    def run(seeds, norm="sample"):
        rnd = StackedRandomGenerator("cpu", seeds)
        options = PredictorCorrector(corrector=corrector, corrector_norm=norm)
        noise = rnd.randn([len(seeds), 2, 3, 3], dtype=torch.float64)
        return sample(schedule, options, noise, 30, randn_like=rnd.randn_like)

    together = run([3, 4, 5])
    torch.testing.assert_close(run([4]), together[1:2], rtol=1e-12, atol=1e-12)
    if corrector == "langevin":  # by the norm of the batch, it depends on the others
        assert float((run([4], "batch") - run([3, 4, 5], "batch")[1:2]).abs().max()) > 1e-3


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("corrector", CORRECTORS)
def test_number_of_evaluations_and_draws(predictor, corrector):
    evaluations, draws = [], []

    def D(x, sigma):
        evaluations.append(float(sigma))
        return gaussian(x, sigma)

    def randn_like(x):
        draws.append(x.shape)
        return torch.randn_like(x)

    options = PredictorCorrector(predictor=predictor, corrector=corrector, n_steps_each=3)
    sample(VE(), options, normal(2, 1, 2, 2), 5, D, randn_like)
    per_step = (predictor != "none") + (3 if corrector != "none" else 0)
    assert len(evaluations) == len(draws) == 5 * per_step
    assert evaluations == sorted(evaluations, reverse=True)


def test_updates_are_announced():
    """After each corrector and each predictor with their level, and at the end with 0."""
    levels = []

    def after_update(x, sigma, randn_like):
        levels.append(float(sigma))
        return x

    grid = sde_grid(VP(), 30)
    options = PredictorCorrector()
    x = predictor_corrector(
        gaussian, normal(1, 1, 2, 2), grid, options, randn_like=torch.randn_like, after_update=after_update
    )
    assert x.shape == (1, 1, 2, 2)
    assert levels == [float(sigma) for sigma in grid.sigmas[:-1] for _ in range(2)] + [0.0]


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral_sampling"])
@pytest.mark.parametrize("schedule", [VE(), DiscreteVE(num_scales=50)], ids=repr)
def test_noise_removal_ends_in_the_denoised_image(schedule, predictor):
    """The last step of SMLD is as long as the noise that is left; without noise removal, new noise comes with it."""
    fixed = normal(2, 3, 4, 4)

    def run(noise_removal: bool) -> torch.Tensor:
        torch.manual_seed(1)
        options = PredictorCorrector(predictor=predictor, noise_removal=noise_removal)
        return sample(schedule, options, normal(2, 3, 4, 4), 50, lambda x, sigma: fixed)

    assert float((run(True) - fixed).abs().max()) < 1e-4
    if predictor == "reverse_diffusion":
        assert float((run(False) - fixed).std()) == pytest.approx(schedule.sigma_min, rel=0.2)
    else:  # ancestral sampling adds none in its last step
        torch.testing.assert_close(run(False), run(True))


def test_discrete_levels_are_those_that_networks_know():
    """Each step is at a level of its own, so labels count down by one."""
    labels = []
    schedule = DiscreteVP(num_scales=40, first_time=1e-3)

    def D(x, sigma):
        labels.append(float(schedule.label(schedule.time(sigma))))
        return gaussian(x, sigma)

    sample(schedule, PredictorCorrector(corrector="none"), normal(1, 1, 2, 2), 40, D, end_time=1e-3)
    expected = schedule.label(torch.linspace(1, 1e-3, 40, dtype=torch.float64)).tolist()
    assert labels == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: PredictorCorrector(predictor="heun"), "--predictor must be one of"),
        (lambda: PredictorCorrector(corrector="heun"), "--corrector must be one of"),
        (lambda: PredictorCorrector(corrector_norm="max"), "--corrector-norm must be one of"),
        (lambda: PredictorCorrector(n_steps_each=0), "--n-steps-each must be at least 1"),
        (lambda: PredictorCorrector(snr=0), "--snr must be positive"),
        (
            lambda: sample(SubVP(), PredictorCorrector(predictor="ancestral_sampling"), one(), 20),
            "no ancestral sampling for sub-VP",
        ),
        (lambda: PredictorCorrector(predictor="ancestral_sampling", probability_flow=True), "no probability flow"),
        (lambda: sample(VP(), PredictorCorrector(), one(), 20), "20 steps are too few"),
        (lambda: sde_grid(VP(), 0), "num_steps"),
        (lambda: sde_grid(VP(), 10, 0.0), "last time"),
    ],
)
def test_bad_options(make, fragment):
    with pytest.raises(UserError, match=fragment):
        make()
