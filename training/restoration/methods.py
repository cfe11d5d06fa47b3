"""Denoisers that know a measurement y = A x + sigma_y n: the methods, each a wrapper around any denoiser.

What a sampler should follow is D_y(x; sigma) = E[x0 | x, y] = D(x; sigma) + sigma^2 grad log p(y | x), by Tweedie's
formula for x given y. The methods differ in how they approximate p(y | x). They are denoisers again, so that every
solver, guidance and network works with each of them.

Where p(x0) is a normal distribution of variance s^2 around any mean, x0 given x is normal, with D as its mean, the
variance s^2 sigma^2 / (s^2 + sigma^2), and dD/dx = s^2 / (s^2 + sigma^2): PiGDM is exact there.
"""

from collections.abc import Callable

import torch

from training.denoiser import Denoiser, per_image
from training.restoration.operators import Operator

Sigma = torch.Tensor


def with_pullback(
    denoiser: Denoiser, x: torch.Tensor, sigma: Sigma, cond: torch.Tensor | None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """D(x; sigma, cond), and the function v -> (dD/dx)^T v of vectors like x; in whatever mode it is asked for."""
    # Copies made outside of inference mode can be differentiated, those of inference mode cannot.
    with torch.inference_mode(False), torch.enable_grad():
        image = x.detach().clone().requires_grad_()
        level, known = sigma.clone(), None if cond is None else cond.clone()
        D = denoiser(image, level, known)

    def pull(v: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(D, image, v.clone().to(D))[0]

    return D.detach(), pull


class PiGDM:
    """Pseudoinverse-guided diffusion (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems").

    With p(x0 | x) taken to be N(D, r^2 I), p(y | x) is N(A D, r^2 A A^T + sigma_y^2 I), and

        D_y = D + sigma^2 (dD/dx)^T A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D),    r^2 = s^2 sigma^2 / (s^2 + sigma^2).

    The paper's r^2 = sigma^2 / (1 + sigma^2) is that of s = 1. It costs a backward pass per evaluation.

    Args:
        denoiser: D(x; sigma, cond), which is differentiated.
        operator: A.
        y: the measurement of each image.
        noise: sigma_y, in the units of the denoiser.
        prior_std: s, the standard deviation of clean pixels.
    """

    def __init__(self, denoiser: Denoiser, operator: Operator, y: torch.Tensor, noise: float, prior_std: float):
        self.denoiser, self.operator, self.y, self.noise, self.prior_std = denoiser, operator, y, noise, prior_std

    def __call__(self, x: torch.Tensor, sigma: Sigma, cond: torch.Tensor | None = None) -> torch.Tensor:
        D, pull = with_pullback(self.denoiser, x, sigma, cond)
        level, s = per_image(sigma, D).square(), self.prior_std**2
        r = s * level / (s + level)
        residual = self.operator.solve(self.y - self.operator(D), self.noise**2 / r) / r
        return D + level * pull(self.operator.adjoint(residual))


class DiffPIR:
    """Plug-and-play restoration by half-quadratic splitting (Zhu et al. 2023, arXiv 2305.08995, Algorithm 1).

    D is pulled to what is nearest to it and agrees with the measurement:

        D_y = argmin_z |y - A z|^2 + rho |z - D|^2 = D + A^T (A A^T + rho I)^-1 (y - A D),
        rho = lambda sigma_y^2 / sigma^2.

    This is PiGDM without dD/dx, and with sigma^2 / lambda for the variance of x0 given x. The paper's mixture of
    estimated and fresh noise (its zeta) is the business of the sampler: deterministic solvers have none.

    Args:
        denoiser: D(x; sigma, cond).
        operator: A.
        y: the measurement of each image.
        noise: sigma_y, in the units of the denoiser.
        weight: lambda, how much the denoiser is trusted.
    """

    def __init__(self, denoiser: Denoiser, operator: Operator, y: torch.Tensor, noise: float, weight: float):
        self.denoiser, self.operator, self.y, self.noise, self.weight = denoiser, operator, y, noise, weight

    def __call__(self, x: torch.Tensor, sigma: Sigma, cond: torch.Tensor | None = None) -> torch.Tensor:
        D = self.denoiser(x, sigma, cond)
        rho = self.weight * self.noise**2 / per_image(sigma, D).square()
        return D + self.operator.adjoint(self.operator.solve(self.y - self.operator(D), rho))


class DPS:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687, Theorem 1 and Algorithm 1).

    p(y | x) is taken to be p(y | x0 = D), N(A D, sigma_y^2 I), as if x said x0 exactly:

        D_y = D + (sigma^2 / v) (dD/dx)^T A^T (y - A D),    v = max(sigma_y^2, |y - A D|^2 / (zeta count)),

    with the number of measured values as the count. With v = sigma_y^2 (the theorem), solvers' steps explode while the
    residual is large; Algorithm 1 divides by the norm of the residual instead, times a constant zeta, which is made for
    1000 steps of one solver. Here the residual bounds the variance from below, for any solver. It costs a backward pass
    per evaluation.

    Args:
        denoiser: D(x; sigma, cond), which is differentiated.
        operator: A.
        y: the measurement of each image.
        noise: sigma_y, in the units of the denoiser.
        zeta: how far steps may go.
    """

    def __init__(self, denoiser: Denoiser, operator: Operator, y: torch.Tensor, noise: float, zeta: float):
        self.denoiser, self.operator, self.y, self.noise = denoiser, operator, y, noise
        self.total = zeta * operator.observed(y).flatten(1).sum(dim=1).clamp(min=1)

    def __call__(self, x: torch.Tensor, sigma: Sigma, cond: torch.Tensor | None = None) -> torch.Tensor:
        D, pull = with_pullback(self.denoiser, x, sigma, cond)
        residual = self.y - self.operator(D)
        v = residual.square().flatten(1).sum(dim=1) / self.total
        v = v.clamp(min=max(self.noise**2, torch.finfo(v.dtype).tiny)).reshape(-1, 1, 1, 1)
        return D + per_image(sigma, D).square() * pull(self.operator.adjoint(residual / v))
