"""UniPC: a multistep predictor whose corrector costs no evaluation.

Source: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (arXiv
2302.04867). With lambda = -ln sigma, a step of length h takes x to

    x' = decay x + scale (w M_0 + sum_m c_m (M_m - M_0)),

where M is the image D or the noise n = (x - D) / sigma, M_0 its value at the beginning, and the others those of earlier
levels (the predictor, UniP) and of the end of the step (the corrector, UniC). The papers' formulas are for u = alpha x;
in them, all alphas cancel.

The corrector uses M at the predicted x'; that value then serves as M_0 of the next step, so a step costs one
evaluation. The last step has no corrector: nothing follows that would evaluate its end.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from training.config.unipc import UniPC
from training.samplers.coefficients import interpolated
from training.samplers.dpm_solver import model
from training.samplers.grids import Grid
from training.samplers.ode import AfterUpdate, RandnLike, Solution


def coefficients(sigmas: Sequence[float], sigma_next: float, options: UniPC) -> list[float]:
    """What multiplies M at the levels `sigmas`, the first of which is where the step begins, in a step to `sigma_next`.

    The paper's coefficients a_m(h) B(h) solve a Vandermonde system, R_p(h) a_p(h) B(h) = phi_p(h): they are those of
    the polynomial in lambda through all values, integrated exactly, and B(h) cancels. It does not where there is one
    difference alone: then a_1 = 1/2, which is right up to h^2.
    """
    if len(sigmas) != 2:
        return interpolated(sigmas, sigma_next, np.log, options.prediction)
    h = math.log(sigmas[0] / sigma_next)
    r = math.log(sigmas[0] / sigmas[1]) / h  # where the other value is: 1 at the end of the step
    scale, growth = (1.0, -math.expm1(-h)) if options.prediction == "data" else (-sigma_next, math.expm1(h))
    B = h if options.B == "B1" else growth
    of_difference = scale * B / 2 / r
    return [scale * growth - of_difference, of_difference]


def unipc(
    D: Solution, x: torch.Tensor, grid: Grid, options: UniPC, *, randn_like: RandnLike, after_update: AfterUpdate
) -> torch.Tensor:
    """UniPC-p (the paper's Algorithms 1 and 2, multistep): one evaluation per step; a step to sigma = 0 gives D.

    The first steps are of lower order. `after_update` is called with the predicted solution at each further level.
    """
    M = model(D, options.prediction)
    known: deque[tuple[float, torch.Tensor]] = deque(maxlen=options.order)  # the newest first

    def step(x: torch.Tensor, values: Sequence[tuple[float, torch.Tensor]], sigma_next: float) -> torch.Tensor:
        x = x if options.prediction == "noise" else sigma_next / values[0][0] * x
        for c, (_, value) in zip(coefficients([s for s, _ in values], sigma_next, options), values, strict=True):
            x = x + c * value
        return x

    begin = x  # the solution at the beginning of the last step
    for sigma, sigma_next in grid.without_repeats().steps():
        if sigma_next == 0:
            return after_update(D(x, sigma), sigma_next, randn_like)
        value = M(x, sigma)
        if known and options.corrector:
            x = step(begin, [*known, (sigma.item(), value)], sigma.item())
        known.appendleft((sigma.item(), value))
        begin = x
        x = after_update(step(begin, list(known), sigma_next.item()), sigma_next, randn_like)
    return x
