"""Noise levels at which a solver of few steps comes nearest to the exact solution, by dynamic programming.

The exact solution of a batch of images is followed once along a fine grid. A step between candidate levels, from exact
values, then has a local error that can be measured, and what an error at a level becomes at the end is measured, too.
With local errors that are independent, the squared distance at the end is the sum, over the steps, of

    (root mean square of the local error x growth from there to the end)^2,

and dynamic programming finds the levels of its minimum. The last step gives D itself; its error is the distance from
D to the exact end, which chooses the lowest level. Watson et al. 2021 (arXiv 2106.03802) find levels by dynamic
programming on a bound of the likelihood; here, the errors of the solver itself and their growth are measured.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dnnlib.errors import UserError
from training.samplers.coefficients import MULTISTEP
from training.samplers.grids import Grid, edm_sigmas
from training.samplers.ode import Solution, multistep

SOLVERS = ("heun", "euler", *MULTISTEP)
FINE = 4  # steps of the exact solution between candidates
GROWTH_STRIDE = 3  # candidates from one at which growth is measured to the next; between, ln growth is linear in theirs
NUDGE = 0.1  # largest error of which growth is measured, over the noise level
StepError = Callable[[tuple[int, ...], int], float]


class ScheduleSearch:
    """The measurements for a denoiser and a solver, from which levels for any number of steps follow.

    Args:
        D: (x, sigma) -> the clean images, float64 like x.
        noise: unit-variance noise [N, ...], where the images start from.
        solver: one of `SOLVERS`.
        sigma_min, sigma_max: the lowest and the highest candidate.
        candidates: how many levels there are to choose from, at EDM's spacing (rho = 7).

    Raises:
        UserError: no such solver.
    """

    def __init__(
        self,
        D: Solution,
        noise: torch.Tensor,
        solver: str,
        sigma_min: float,
        sigma_max: float,
        candidates: int = 36,
    ):
        if solver not in SOLVERS:
            raise UserError(f"--sampler={solver}: levels are found for {', '.join(SOLVERS)}")
        self.D, self.solver = D, solver
        fine = edm_sigmas((candidates - 1) * FINE + 1, sigma_min, sigma_max)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def watched(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            seen.append((x, D(x, sigma)))
            return seen[-1][1]

        self.end = self._solve(watched, noise.double() * sigma_max, fine)
        self.sigmas = fine[:-1:FINE]
        self.x, self.denoised = (torch.stack(values) for values in zip(*seen[::FINE], strict=True))
        self.growth = self._measured_growth()

    @staticmethod
    def _solve(D: Solution, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        solve = multistep(MULTISTEP["sqrt-3m"])
        return solve(D, x, Grid(sigmas), None, randn_like=torch.randn_like, after_update=lambda x, _sigma, _randn: x)

    def _euler(self, start: int, end: int) -> torch.Tensor:
        """Euler's step from the exact solution at one candidate to another."""
        ratio = (self.sigmas[end] / self.sigmas[start]).item()
        return ratio * self.x[start] + (1 - ratio) * self.denoised[start]

    def _measured_growth(self) -> np.ndarray:
        """Root mean square at the end over that at each candidate, of errors like those of Euler's step to it, [K]."""
        count = len(self.sigmas)
        places = sorted({*range(1, count, GROWTH_STRIDE), count - 1})
        found = []
        for k in places:
            error = self._euler(max(k - GROWTH_STRIDE, 0), k) - self.x[k]
            error = error * min(1.0, NUDGE * self.sigmas[k].item() / rms(error))
            both = torch.cat([self.x[k] + error, self.x[k] - error])
            above, below = self._solve(self.D, both, torch.cat([self.sigmas[k:], self.sigmas.new_zeros(1)])).chunk(2)
            found.append(math.log(rms(above - below) / (2 * rms(error))))
        return np.exp(np.interp(range(count), places, found))

    # -----------------------------------------------------------------------------------------------------
    # Local errors, root mean square over images and dimensions

    def _step_error(self) -> tuple[int, StepError]:
        """How many earlier levels the solver looks at, and the error of a step from the last of some to another."""
        if self.solver in MULTISTEP:
            method = MULTISTEP[self.solver]
            return method.order, functools.cache(functools.partial(self._multistep_error, method.coefficients))
        return 1, functools.cache(self._heun_error if self.solver == "heun" else self._euler_error)

    @functools.cached_property
    def gram(self) -> np.ndarray:
        """Mean products of all x and D at the candidates, [2 K, 2 K]: local errors are sums of these vectors."""
        vectors = torch.cat([self.x, self.denoised]).flatten(1)
        return (vectors @ vectors.T / vectors.shape[1]).cpu().numpy()

    def _multistep_error(
        self, coefficients: Callable[[Sequence[float], float], list[float]], known: tuple[int, ...], end: int
    ) -> float:
        """Of a step that continues the values of D at the levels `known`, the last of which it starts from."""
        newest = known[::-1]
        weights = coefficients(self.sigmas[list(newest)].tolist(), self.sigmas[end].item())
        count, start = len(self.sigmas), known[-1]
        places = [start, end, *(count + k for k in newest)]
        factors = np.array([(self.sigmas[end] / self.sigmas[start]).item(), -1.0, *weights])
        return max(float(factors @ self.gram[np.ix_(places, places)] @ factors), 0.0) ** 0.5

    def _euler_error(self, known: tuple[int, ...], end: int) -> float:
        return rms(self._euler(known[-1], end) - self.x[end])

    def _heun_error(self, known: tuple[int, ...], end: int) -> float:
        start, sigma = known[-1], self.sigmas
        first = self._euler(start, end)
        slopes = (self.x[start] - self.denoised[start]) / sigma[start], (first - self.D(first, sigma[end])) / sigma[end]
        return rms(self.x[start] + (sigma[end] - sigma[start]) * (slopes[0] + slopes[1]) / 2 - self.x[end])

    # -----------------------------------------------------------------------------------------------------
    # Dynamic programming

    def levels(self, count: int) -> tuple[list[float], float]:
        """The noise levels of the smallest expected distance to the exact solution, and that distance.

        Args:
            count: how many levels, of which the first is the highest candidate; a step to 0 follows the last one.

        Raises:
            UserError: fewer than one, or more than there are candidates.
        """
        total = len(self.sigmas)
        if not 1 <= count <= total:
            raise UserError(f"--steps={count}: the levels are chosen from {total} (--candidates): ask for 1 to {total}")
        order, error = self._step_error()
        # By the last levels, which are all that the solver looks at: the least cost so far, and the way there.
        best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
        for _ in range(count - 1):
            further: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
            for known, (cost, way) in best.items():
                for end in range(known[-1] + 1, total):
                    costs = cost + (error(known, end) * self.growth[end]) ** 2
                    key = (*known, end)[-order:]
                    if key not in further or costs < further[key][0]:
                        further[key] = costs, (*way, end)
            best = further
        last = [rms(D - self.end) ** 2 for D in self.denoised]
        cost, way = min((cost + last[known[-1]], way) for known, (cost, way) in best.items())
        return self.sigmas[list(way)].tolist(), math.sqrt(cost)


def rms(x: torch.Tensor) -> float:
    """Root mean square over all elements."""
    return float(x.square().mean().sqrt())
