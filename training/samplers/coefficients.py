"""Coefficients of multistep solvers, which use earlier values of D. Knows no tensors.

In lambda = -log sigma the probability flow is dx/dlambda = D - x. Solving its linear part exactly gives, for a step of
length h in lambda,

    x(lambda + h) = e^-h x(lambda) + int_0^h e^(s-h) D(lambda + s) ds.

Multistep solvers replace D by an extrapolation of its last values, and so need one evaluation per step.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)  # exact to rounding for steps between neighbouring noise levels


def dpmpp_2m(sigmas: Sequence[float], sigma_next: float) -> list[float]:
    """DPM-Solver++(2M): D extrapolated to the middle of the step (Lu et al. 2022, arXiv 2211.01095, Algorithm 2)."""
    h = math.log(sigmas[0] / sigma_next)
    total = -math.expm1(-h)
    if len(sigmas) == 1:
        return [total]
    reach = h / 2 / math.log(sigmas[1] / sigmas[0])
    return [total * (1 + reach), -total * reach]


def dpmpp_3m(sigmas: Sequence[float], sigma_next: float) -> list[float]:
    """DPM-Solver++ of order 3 (arXiv 2211.01095, Eq. 12): the polynomial in lambda through the last values of D."""
    return interpolated(sigmas, sigma_next, np.log)


def sqrt_3m(sigmas: Sequence[float], sigma_next: float) -> list[float]:
    """The same with a polynomial in sqrt(sigma), which stays finite where sigma -> 0 and D no longer changes."""
    return interpolated(sigmas, sigma_next, np.sqrt)


def interpolated(
    sigmas: Sequence[float],
    sigma_next: float,
    variable: Callable[[np.ndarray], np.ndarray],
    prediction: str = "data",
) -> list[float]:
    """Coefficients of the values at levels `sigmas` in a step from the first of them: their polynomial, integrated.

    Of the image ('data') they are int_0^h e^(s-h) L_j(s) ds for Lagrange's polynomials L_j in `variable` of sigma, by
    Gauss's quadrature; of the noise, in which dx/dlambda = -sigma n, they are -sigma_next int_0^h e^(h-s) L_j(s) ds.
    """
    h = math.log(sigmas[0] / sigma_next)
    s = (NODES + 1) / 2 * h
    kernel = WEIGHTS / 2 * h * (np.exp(s - h) if prediction == "data" else -sigma_next * np.exp(h - s))
    u, known = variable(sigmas[0] * np.exp(-s)), variable(np.array(sigmas))
    coefficients = []
    for j, u_j in enumerate(known):
        others = np.delete(known, j)
        basis = np.prod((u[:, None] - others) / (u_j - others), axis=1)
        coefficients.append(float(kernel @ basis))
    return coefficients


class Multistep(NamedTuple):
    """A solver that uses the last `order` values of D.

    Args:
        order: of accuracy, once as many values are there; the first steps are of lower order.
        coefficients: of those values, the newest first, in a step from sigmas[0] to sigma_next > 0, where `sigmas` are
            the noise levels of the values.
    """

    order: int
    coefficients: Callable[[Sequence[float], float], list[float]]


MULTISTEP = {
    "dpmpp-2m": Multistep(2, dpmpp_2m),
    "dpmpp-3m": Multistep(3, dpmpp_3m),
    "sqrt-3m": Multistep(3, sqrt_3m),
}
