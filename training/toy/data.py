"""The two-dimensional ground truth of the toy example: two tree-shaped classes as mixtures of Gaussians.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024 (arXiv 2406.02507),
Appendix C. The paper does not give all numbers of the construction (lengths, widths, angles, order of the random
draws); they were fitted to the parameters of the published distribution.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from dnnlib.errors import UserError
from training.config.metrics import TOY_CLASSES

SEED = 2
DEPTH = 7  # of a tree: 127 branches
GAUSSIANS_PER_BRANCH = 8
TRUNK_ANGLE = {"A": math.pi / 4, "B": 5 * math.pi / 4}  # the trees grow away from each other
TRUNK_LENGTH, TRUNK_WIDTH, SHRINKAGE = 0.292, 0.012, 0.8  # per level
FORK_ANGLE, FORK_SHRINKAGE = 1.0, 0.7  # radians, per level
VARIATION = 0.2  # standard deviation of lengths and angles, as a share of them
# Affine map to about zero mean and a standard deviation of 0.5 along both axes, for both classes together.
ORIGIN, STRETCH = np.array([0.0030, 0.0325]), np.array([1.3136, 1.3844])

ROWS = 128  # points computed at a time, so that intermediate results stay in the processor's cache


class GaussianMixture(torch.nn.Module):
    """p(x) = sum_k phi_k N(x; mu_k, Sigma_k) in two dimensions, also with noise of standard deviation sigma added.

    Noise turns Sigma_k into Sigma_k + sigma^2 I. Points x are [..., 2]; sigma is a number or [...]. Everything is
    computed from log-densities, so it is finite even where the density underflows.

    Args:
        phi: weights [K], summing to 1.
        mu: means [K, 2].
        Sigma: covariances [K, 2, 2].
    """

    phi: torch.Tensor
    mu: torch.Tensor
    Sigma: torch.Tensor
    cholesky: torch.Tensor
    rows: torch.Tensor

    def __init__(self, phi: torch.Tensor, mu: torch.Tensor, Sigma: torch.Tensor):
        super().__init__()
        self.register_buffer("phi", phi)
        self.register_buffer("mu", mu)
        self.register_buffer("Sigma", Sigma)
        self.register_buffer("cholesky", torch.linalg.cholesky(Sigma))
        # mu_x, mu_y, Sigma_xx, Sigma_yy, Sigma_xy, each contiguous: neighbours in memory are computed together.
        self.register_buffer("rows", torch.stack([*mu.T, Sigma[:, 0, 0], Sigma[:, 1, 1], Sigma[:, 0, 1]]))

    def pdf(self, x: torch.Tensor, sigma: torch.Tensor | float = 0) -> torch.Tensor:
        """p(x; sigma), [...]."""
        return self.logp(x, sigma).exp()

    def logp(self, x: torch.Tensor, sigma: torch.Tensor | float = 0) -> torch.Tensor:
        """log p(x; sigma), [...]."""
        parts = []
        for rows in _rows(x, sigma):
            peak, exponent, _, _ = self._components(*rows)
            parts.append((peak.log() + exponent).logsumexp(dim=1))
        return torch.cat(parts).reshape(x.shape[:-1])

    def posterior(self, x: torch.Tensor, sigma: torch.Tensor | float = 0) -> torch.Tensor:
        """Probability that x comes from each component, [..., K]."""
        parts = []
        for rows in _rows(x, sigma):
            peak, exponent, _, _ = self._components(*rows)
            parts.append((peak.log() + exponent).softmax(dim=1))
        return torch.cat(parts).reshape(*x.shape[:-1], -1)

    def score(self, x: torch.Tensor, sigma: torch.Tensor | float = 0) -> torch.Tensor:
        """Gradient of log p(x; sigma) with respect to x, shaped like `x`."""
        return torch.cat([self.score_at_once(*rows) for rows in _rows(x, sigma)]).reshape(x.shape)

    def score_at_once(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """`score` of x [N, 2] and sigma [N] in one piece, which `torch.compile` turns into one kernel."""
        peak, exponent, x_pull, y_pull = self._components(x, sigma)
        # Relative to the largest exponential, so that not all underflow. The peaks are within a few powers of ten of
        # each other and need no logarithm. Below exp(-80) nothing counts, but denormal numbers would be slow.
        weight = peak * (exponent - exponent.amax(dim=1, keepdim=True)).clamp(min=-80).exp()
        gradient = torch.stack([(weight * x_pull).sum(dim=1), (weight * y_pull).sum(dim=1)], dim=1)
        return gradient / weight.sum(dim=1, keepdim=True)

    def sample(
        self,
        shape: int | Sequence[int],
        sigma: torch.Tensor | float = 0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Random points [*shape, 2]; `sigma` is a number or of that shape."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        device = self.mu.device
        k = self.phi.multinomial(math.prod(shape), replacement=True, generator=generator)
        z = torch.randn(len(k), 2, 1, generator=generator, device=device)
        x = (self.mu[k] + (self.cholesky[k] @ z).squeeze(-1)).reshape(*shape, 2)
        noise = torch.randn(x.shape, generator=generator, device=device)
        return x + torch.as_tensor(sigma, device=device).unsqueeze(-1) * noise

    def _components(
        self, x: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Components at x [N, 2] with noise sigma [N], all [N, K], where C = Sigma_k + sigma^2 I.

        Returns:
            peak, exponent: such that phi_k N(x; mu_k, C) = peak * exp(exponent).
            x_pull, y_pull: coordinates of C^-1 (mu_k - x), the component's own score.
        """
        mu_x, mu_y, Sigma_xx, Sigma_yy, C_xy = self.rows
        # The difference comes first: expanding the product with the inverse would lose digits.
        dx, dy = mu_x - x[:, :1], mu_y - x[:, 1:]
        variance = sigma.square().unsqueeze(1)
        C_xx, C_yy = Sigma_xx + variance, Sigma_yy + variance
        det = C_xx * C_yy - C_xy.square()
        x_pull = (C_yy * dx - C_xy * dy) / det
        y_pull = (C_xx * dy - C_xy * dx) / det
        return self.phi / (2 * math.pi * det.sqrt()), -(dx * x_pull + dy * y_pull) / 2, x_pull, y_pull


def _rows(x: torch.Tensor, sigma: torch.Tensor | float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Points [ROWS, 2] with their noise levels [ROWS]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
    return list(zip(x.reshape(-1, 2).split(ROWS), sigma.reshape(-1).split(ROWS), strict=True))


@functools.cache
def gt(classes: str = "A", device: torch.device | str = "cpu") -> GaussianMixture:
    """Ground truth of class 'A', of 'B', or of both, 'AB', with shares proportional to the lengths of their branches.

    Component k belongs to branch k // 8. Each tree has 1016 components; those of A come first. The same object is
    returned every time: do not change it.

    Raises:
        UserError: an unknown class.
    """
    if classes not in TOY_CLASSES:
        raise UserError(f"unknown class {classes!r} (known: {', '.join(TOY_CLASSES)})")
    parts = [_trees()[name] for name in classes]
    phi, mu, Sigma = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    tensors = [torch.tensor(array, dtype=torch.float32, device=device) for array in (phi / phi.sum(), mu, Sigma)]
    return GaussianMixture(*tensors)


@functools.cache
def _trees() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """phi [K] (not normalised), mu [K, 2] and Sigma [K, 2, 2] of each class, float64.

    One generator draws both trees, A first.
    """
    random_state = np.random.RandomState(SEED)
    return {name: _tree(random_state, angle) for name, angle in TRUNK_ANGLE.items()}


def _tree(random_state: np.random.RandomState, trunk_angle: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    phi, mu, Sigma = [], [], []

    def vary(value: float) -> float:
        return value * (1 + VARIATION * random_state.randn())

    def grow(level: int, start: np.ndarray, angle: float) -> None:
        """Add a branch and everything that grows from it, all of the left side before the right."""
        if level == DEPTH:
            return
        along, across = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        length = vary(TRUNK_LENGTH * SHRINKAGE**level)
        width = TRUNK_WIDTH * SHRINKAGE**level
        # A row of overlapping Gaussians that stops short of both ends. The two children together weigh as much as one
        # branch of their length.
        places = np.linspace(0.07, 0.93, GAUSSIANS_PER_BRANCH)
        spread = (0.06 * length) ** 2 * np.outer(along, along) + width**2 * np.outer(across, across)
        for place in places:
            phi.append(length / 2**level)
            mu.append((start + place * length * along + ORIGIN) * STRETCH)
            Sigma.append(spread * np.outer(STRETCH, STRETCH))
        for side in (1, -1):
            grow(level + 1, start + length * along, angle + side * vary(FORK_ANGLE * FORK_SHRINKAGE**level))

    grow(0, np.zeros(2), trunk_angle)
    return np.array(phi), np.array(mu), np.array(Sigma)
