"""Methods of restoration, on a normal prior whose posterior is known, by every solver."""

import math

import pytest
import torch

from training.config.dpm_solver import AdaptiveDPMSolver
from training.config.samplers import SOLVERS, GridConfig, SamplerConfig
from training.restoration.methods import DPS, DiffPIR, PiGDM
from training.restoration.operators import AveragePool, Blur, Mask, box_kernel, gaussian_kernel
from training.samplers.grids import edm_sigmas
from training.samplers.sampler import Sampler

SHAPE, STD = (1, 4, 4), 0.5
PIXELS = math.prod(SHAPE)
ZETA = 3.0
MEAN = torch.linspace(-0.6, 0.8, PIXELS).reshape(SHAPE)


class Gaussian:
    """The exact denoiser of images from N(mean, STD^2 I)."""

    def __init__(self, mean=MEAN):
        self.mean = mean

    def __call__(self, x, sigma, labels=None):
        level = sigma.to(x).reshape(-1, 1, 1, 1) ** 2
        return (STD**2 * x + level * self.mean.to(x)) / (STD**2 + level)


def known(*rows: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, *SHAPE[1:])
    mask[:, :, list(rows)] = 1
    return mask


OPERATORS = {
    "mask": Mask(known(0, 3)),
    "pool": AveragePool(2),
    "gaussian": Blur(gaussian_kernel(0.5), SHAPE[1:]),
    "box": Blur(box_kernel(2), SHAPE[1:]),  # singular
}


def measurement(operator, noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = MEAN + STD * torch.randn(1, *SHAPE, generator=generator)
    y = operator(x)
    return y + noise * torch.randn(y.shape, generator=generator) * operator.observed(y)


def posterior(
    operator, y: torch.Tensor, noise: float, prior: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [pixels] and covariance [pixels, pixels] of x given y, float64; that of the prior is STD^2 I or given."""
    eye = torch.eye(PIXELS, dtype=torch.float64)
    C = STD**2 * eye if prior is None else prior
    A = operator(eye.reshape(-1, *SHAPE)).flatten(1).T
    seen = operator.observed(y).flatten().bool()
    A, d = A[seen], (y.double() - operator(MEAN[None].double())).flatten()[seen]
    gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + noise**2 * torch.eye(len(A), dtype=torch.float64))
    return MEAN.double().flatten() + gain @ d, C - gain @ A @ C


def flow(denoiser, noise: torch.Tensor, steps: int = 100) -> torch.Tensor:
    """Where the probability flow takes noise, [N, pixels]; from high enough for the measurement to be forgotten."""
    config = SamplerConfig(solver="heun", grid=GridConfig(num_steps=steps, sigma_max=500.0))
    return Sampler(config)(denoiser, noise, dtype=torch.float64).flatten(1)


@pytest.mark.parametrize("noise", [0.05, 0.5])
@pytest.mark.parametrize("name", OPERATORS)
def test_pigdm_is_exact(name, noise):
    """Mean and covariance: the flow is affine in its noise, x = M z + mean, and the covariance is M M^T."""
    operator = OPERATORS[name]
    y = measurement(operator, noise)
    mean, covariance = posterior(operator, y, noise)
    z = torch.cat([torch.zeros(1, *SHAPE), torch.eye(PIXELS).reshape(-1, *SHAPE)]).double()
    x = flow(PiGDM(Gaussian(), operator, y, noise, STD), z)
    M = (x[1:] - x[0]).T
    assert (x[0] - mean).abs().max() < 2e-3
    assert (M @ M.T - covariance).abs().max() < 2e-3
    # Else the measurement would say nothing.
    assert (mean - MEAN.flatten()).abs().max() > 0.1 and covariance.trace() < 0.96 * PIXELS * STD**2


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "consistency"])  # takes D for no mean
def test_every_solver_finds_the_posterior(solver):
    operator, noise = OPERATORS["mask"], 0.2
    y = measurement(operator, noise)
    mean, covariance = posterior(operator, y, noise)
    count = 2000
    # What is published as the tolerance is meant for pictures.
    config = SamplerConfig(solver=solver, grid=GridConfig(num_steps=60), dpm_adaptive=AdaptiveDPMSolver(rtol=0.01))
    z = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)

    def randn_like(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    x = Sampler(config)(PiGDM(Gaussian(), operator, y, noise, STD), z, randn_like=randn_like).flatten(1).double()
    error = 5 * STD / math.sqrt(count)
    assert (x.mean(dim=0) - mean).abs().max() < error
    assert (x.std(dim=0) - covariance.diagonal().sqrt()).abs().max() < error


@pytest.mark.parametrize("name", OPERATORS)
def test_diffpir_solves_its_problem(name):
    """D_y is where the derivative of |y - A z|^2 + rho |z - D|^2 is zero; and without noise, A D_y = y."""
    operator, sigma = OPERATORS[name], torch.tensor([0.3, 2.0])
    y, x = measurement(operator, 0.1), torch.randn(2, *SHAPE)
    z, D = DiffPIR(Gaussian(), operator, y, 0.1, 4.0)(x, sigma), Gaussian()(x, sigma)
    rho = (4.0 * 0.1**2 / sigma**2).reshape(-1, 1, 1, 1)
    gradient = operator.adjoint(operator(z) - y) + rho * (z - D)
    assert gradient.abs().max() < 1e-5 and (z - D).abs().max() > 0.05
    exact = operator(torch.randn(1, *SHAPE))
    torch.testing.assert_close(
        operator(DiffPIR(Gaussian(), operator, exact, 0.0, 1.0)(x, sigma)), exact.expand(2, -1, -1, -1)
    )


def test_diffpir_against_its_limit():
    """All pixels known, prior N(0, s^2): the flow has a solution, which is the posterior mean up to order q / s^2.

    With t = sigma^2 and q = lambda sigma_y^2, dx/dt = x (t + s^2 + q) / (2 (s^2 + t)(q + t)) - y / (2 (q + t)), whose
    homogeneous solution is mu(t) = (t + s^2)^(a / 2) (t + q)^((1 - a) / 2) with a = q / (q - s^2).
    """
    operator, s = Mask(torch.ones(1, 1, *SHAPE[1:])), STD**2
    for noise, weight in [(0.05, 1.0), (0.2, 1.0), (0.2, 4.0)]:
        q = weight * noise**2
        a = q / (q - s)
        t = torch.logspace(-9, 7, 200_001, dtype=torch.float64)
        log_mu = a / 2 * (t + s).log() + (1 - a) / 2 * (t + q).log()
        log_mu_0 = a / 2 * math.log(s) + (1 - a) / 2 * math.log(q)
        factor = torch.trapezoid((log_mu_0 - log_mu).exp() / (2 * (t + q)), t).item()
        y = torch.full([1, *SHAPE], 0.7)
        x = flow(
            DiffPIR(Gaussian(torch.zeros(SHAPE)), operator, y, noise, weight), torch.zeros(1, *SHAPE).double(), 400
        )
        assert x.mean().item() == pytest.approx(0.7 * factor, abs=2e-3)
        if weight == 1:
            assert x.mean().item() == pytest.approx(0.7 * s / (s + noise**2), abs=0.7 * noise**2 / s)


def test_dps_against_its_limit():
    """All pixels known, prior N(0, s^2), residuals below sigma_y: the mean is F y with F = k int_0^1 (1 - u)^(-1/2)
    e^(-k u) du, k = s^2 / (2 sigma_y^2), where the posterior's is s^2 / (s^2 + sigma_y^2) y: the same up to order k^2."""
    operator, y = Mask(torch.ones(1, 1, *SHAPE[1:])), torch.full([1, *SHAPE], 0.3)
    for noise in (0.5, 1.0, 2.0):
        k = STD**2 / (2 * noise**2)
        u = 1 - torch.linspace(0, 1, 100_001, dtype=torch.float64) ** 2  # makes the integrand smooth
        factor = k * torch.trapezoid(2 * (-k * u).exp(), torch.linspace(0, 1, 100_001, dtype=torch.float64)).item()
        x = flow(DPS(Gaussian(torch.zeros(SHAPE)), operator, y, noise, 1.0), torch.zeros(1, *SHAPE).double(), 400)
        assert x.mean().item() == pytest.approx(0.3 * factor, abs=1e-3)
        assert x.mean().item() == pytest.approx(0.3 * STD**2 / (STD**2 + noise**2), abs=0.3 * 3 * k**2)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("method", ["diffpir", "dps"])
def test_means_with_little_noise(method, name):
    """What is known is met, and what is not keeps the prior's mean: within a share of STD of the posterior mean."""
    operator, noise = OPERATORS[name], 0.02
    y = measurement(operator, noise)
    mean, _ = posterior(operator, y, noise)
    D = (
        DiffPIR(Gaussian(), operator, y, noise, 1.0)
        if method == "diffpir"
        else DPS(Gaussian(), operator, y, noise, ZETA)
    )
    z = torch.randn(500, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    x = flow(D, z)
    assert (x.mean(dim=0) - mean).abs().max() < 0.15 * STD
    assert (MEAN.flatten() - mean).abs().max() > 0.6 * STD


class Correlated:
    """The exact denoiser of images from N(MEAN, C), where C falls with the distance of pixels, exp(-d / 2)."""

    def __init__(self):
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        places = torch.stack([rows, columns], dim=-1).reshape(-1, 2)
        self.covariance = STD**2 * (-torch.cdist(places, places) / 2).exp().double()
        self.values, self.vectors = (part.float() for part in torch.linalg.eigh(self.covariance))

    def __call__(self, x, sigma, labels=None):
        level, offset = sigma.to(x).reshape(-1, 1) ** 2, (x - MEAN).flatten(1) @ self.vectors
        return MEAN + (offset * self.values / (self.values + level) @ self.vectors.T).reshape(x.shape)


@pytest.mark.parametrize("method", ["pigdm", "diffpir", "dps"])
@pytest.mark.parametrize("name", ["mask", "pool"])
def test_correlated_pixels(name, method):
    """Then all are approximations: means are off by less than 0.45 of what the measurement moves them, at the worst
    pixel."""
    operator, noise, prior = OPERATORS[name], 0.05, Correlated()
    root = torch.linalg.cholesky(prior.covariance)
    draws = torch.randn(PIXELS, generator=torch.Generator().manual_seed(1)).double()
    y = operator((MEAN.flatten() + root @ draws).float().reshape(1, *SHAPE))
    y = y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(2)) * operator.observed(y)
    mean, _ = posterior(operator, y, noise, prior.covariance)
    methods = {
        "pigdm": PiGDM(prior, operator, y, noise, STD),
        "diffpir": DiffPIR(prior, operator, y, noise, 1.0),
        "dps": DPS(prior, operator, y, noise, ZETA),
    }
    x = flow(methods[method], torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(3)).double())
    moved = (MEAN.flatten() - mean).abs().max()
    assert moved > 2 * STD and (x.mean(dim=0) - mean).abs().max() < 0.45 * moved


def test_levels_per_image_and_inference_mode():
    """Solvers with steps of their own give a level for each image; commands run without gradients."""
    operator = OPERATORS["pool"]
    y, x, sigma = (
        measurement(operator, 0.1),
        torch.randn(3, *SHAPE),
        torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64),
    )
    for D in (
        PiGDM(Gaussian(), operator, y, 0.1, STD),
        DiffPIR(Gaussian(), operator, y, 0.1, 1.0),
        DPS(Gaussian(), operator, y, 0.1, ZETA),
    ):
        together = D(x, sigma)
        for i in range(3):
            torch.testing.assert_close(D(x[i : i + 1], sigma[i]), together[i : i + 1])
        with torch.inference_mode():
            inside = x.clone()
            torch.testing.assert_close(D(inside, sigma), together)
        assert not together.requires_grad


def test_a_pixel_moves_its_neighbours():
    """The gradient takes what is known of one pixel to those that the network knows to be related to it."""

    def mean_of_image(x, sigma, labels=None):
        return x.mean(dim=(1, 2, 3), keepdim=True).expand_as(x)

    operator = Mask(known(0))
    D = PiGDM(mean_of_image, operator, torch.ones(1, *SHAPE) * known(0), 0.1, STD)(
        torch.zeros(1, *SHAPE), edm_sigmas(3)[1]
    )
    assert (D[:, :, 1:] > 0.01).all()
