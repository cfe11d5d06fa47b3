"""Options of the solvers of the DPM-Solver family, and of the grids that they follow."""

from dataclasses import dataclass

from training.config.fields import Config, option

SPACINGS = ("time", "log-snr", "quadratic")  # what knots are evenly spaced in: t, ln(1 / sigma), the root of t


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Config):
    """What singlestep and multistep solvers expand, and to which order."""

    order: int = option(3, "Order of DPM-Solver's steps", low=1, high=3)
    prediction: str = option(
        "data", "What DPM-Solver expands: data = DPM-Solver++, noise = DPM-Solver", choices=("data", "noise")
    )
    solver_type: str = option(
        "dpmsolver", "Weight of DPM-Solver's second derivative terms", choices=("dpmsolver", "taylor")
    )
    fixed_order: bool = option(False, "Give all singlestep steps the same order, also the last ones")


@dataclass(frozen=True, kw_only=True)
class AdaptiveDPMSolver(Config):
    """Step size control of DPM-Solver-12 and -23 (Lu et al. 2022, arXiv 2206.00927, Appendix C)."""

    order: int = option(3, "The higher of the two orders that are compared", low=2, high=3)
    prediction: str = option("noise", "What is expanded: data or noise", choices=("data", "noise"))
    atol: float = option(0.0078, "Absolute tolerance", above=0)
    rtol: float = option(0.05, "Relative tolerance", above=0)
    first_step: float = option(0.05, "First step in ln(1 / sigma)", above=0)
    safety: float = option(0.9, "Factor of each proposed step", above=0, high=1)
    common_step: bool = option(False, "Give all samples of a batch the same steps, as published")
