"""Options of the solvers of the DPM-Solver family, and of the grids that they follow."""

from dataclasses import dataclass

from training.config.fields import Config, option

SPACINGS = ("time", "log-snr", "quadratic")  # what knots are evenly spaced in: t, ln(1 / sigma), the root of t


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Config):
    """What singlestep and multistep solvers expand, and to which order."""

    order: int = option(3, "Order of the steps of --sampler=dpm-single and dpm-multi", low=1, high=3)
    prediction: str = option(
        "data", "What they expand: data = DPM-Solver++, noise = DPM-Solver", choices=("data", "noise")
    )
    solver_type: str = option("dpmsolver", "Weight of their second derivative terms", choices=("dpmsolver", "taylor"))
    fixed_order: bool = option(False, "Give all steps of dpm-single the same order, also the last ones")


@dataclass(frozen=True, kw_only=True)
class AdaptiveDPMSolver(Config):
    """Step size control of DPM-Solver-12 and -23 (Lu et al. 2022, arXiv 2206.00927, Appendix C)."""

    order: int = option(
        3,
        "The higher of the two orders that --sampler=dpm-adaptive compares",
        flag="--adaptive-order",
        low=2,
        high=3,
    )
    prediction: str = option(
        "noise", "What it expands: data or noise", flag="--adaptive-prediction", choices=("data", "noise")
    )
    atol: float = option(0.0078, "Its absolute tolerance", flag="--adaptive-atol", above=0)
    rtol: float = option(0.05, "Its relative tolerance", flag="--adaptive-rtol", above=0)
    first_step: float = option(0.05, "Its first step in ln(1 / sigma)", flag="--adaptive-first-step", above=0)
    safety: float = option(0.9, "Factor of each proposed step", flag="--adaptive-safety", above=0, high=1)
    common_step: bool = option(
        False, "Give all images of a batch the same steps, as published", flag="--adaptive-common-step"
    )
