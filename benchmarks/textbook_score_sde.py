"""Parts of score-SDE models written plainly (arXiv 2011.13456): what their benchmarks compare with."""

from collections.abc import Callable

import numpy as np
import scipy.integrate
import torch
import torch.nn.functional as F


def resample(x: torch.Tensor, taps: tuple[float, ...], up: int, down: int, pad: tuple[int, int]) -> torch.Tensor:
    """Zeros between pixels, padding, a convolution of each channel with the filter, and every `down`-th pixel."""
    N, C, H, W = x.shape
    k = torch.tensor(taps)
    k = torch.outer(k, k)
    k = k / k.sum() * up**2
    x = x.reshape(N * C, 1, H, 1, W, 1)
    x = F.pad(x, [0, up - 1, 0, 0, 0, up - 1]).reshape(N * C, 1, H * up, W * up)
    x = F.pad(x, [pad[0], pad[1], pad[0], pad[1]])
    x = F.conv2d(x, k.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return x.reshape(N, C, *x.shape[2:])


def log_likelihood(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    epsilon: torch.Tensor,
    beta: tuple[float, float],
    tolerance: float,
    first_time: float,
) -> torch.Tensor:
    """Density of images by the probability flow of VP: one call of the network for the drift, another for its
    divergence, and a solver in NumPy."""
    shape, dims = images.shape, images[0].numel()

    def drift(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rate = (beta[0] + t * (beta[1] - beta[0])).reshape(-1, 1, 1, 1)
        return -rate * x / 2 - rate * score(x, t) / 2

    def divergence(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            (gradient,) = torch.autograd.grad((drift(x, t) * epsilon).sum(), x)
        return (gradient * epsilon).sum(dim=(1, 2, 3))

    def derivative(t: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[: -len(images)].reshape(shape)).float()
        times = torch.full([len(images)], t)
        with torch.no_grad():
            along = drift(x, times)
        return np.concatenate([along.numpy().reshape(-1), divergence(x, times).numpy().reshape(-1)])

    start = np.concatenate([images.numpy().reshape(-1), np.zeros(len(images))])
    found = scipy.integrate.solve_ivp(derivative, (first_time, 1), start, rtol=tolerance, atol=tolerance, method="RK45")
    end = torch.from_numpy(found.y[:, -1])
    z, delta = end[: -len(images)].reshape(len(images), -1), end[-len(images) :]
    return -(dims * np.log(2 * np.pi) + z.square().sum(dim=1)) / 2 + delta
