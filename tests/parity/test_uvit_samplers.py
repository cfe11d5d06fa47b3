"""Samplers of U-ViT against the golden values (tolerances in the README of the golden files)."""

from collections.abc import Callable

import pytest
import torch
from uvit_golden import GoldenFile, error, names, network

from training.config.dpm_solver import AdaptiveDPMSolver, DPMSolver
from training.config.samplers import EulerMaruyama
from training.denoiser import Preconditioned
from training.guidance import GuidedDenoiser
from training.preconditioning import DataPrediction, Epsilon
from training.samplers.dpm_solver import adaptive, multistep, singlestep, singlestep_orders
from training.samplers.euler_maruyama import euler_maruyama
from training.samplers.grids import Grid, sde_grid, spaced_times, time_grid, with_inner_levels
from training.samplers.thresholding import ThresholdedDenoiser
from training.schedules import VP
from training.schedules_uvit import CosineVP, InterpolatedVP

TOLERANCES = {"em": 5e-6, "pp": 1e-5, "dpm": 3e-4, "adaptive": 2e-2}
LABELS, MANY_STEPS, EXACT = 2e-2, 48, 5e-6
SPACINGS = {"time_uniform": "time", "time_quadratic": "quadratic", "t2": "quadratic", "logSNR": "log-snr"}
SCHEDULES = {"vp": VP(), "cosine": CosineVP(), "discrete": InterpolatedVP()}
PRECONDITIONINGS = {"noise_pred": Epsilon, "x0_pred": DataPrediction}
FILES = {name: GoldenFile(name) for name in names("samplers*")}
(TABLES,) = [GoldenFile(name) for name in names("schedules*")]


class Run:
    """A run of a golden file: its name's parts, its options, and the denoiser that made it."""

    def __init__(self, g: GoldenFile, name: str):
        self.g, self.name, self.options = g, name, g.meta["runs"][name]
        self.solver, *parts = name.split("/")
        self.schedule = SCHEDULES[parts.pop(0) if parts[0] in SCHEDULES else "discrete"]
        self.model = parts.pop(0)
        self.prediction = parts.pop(0) if parts[0] in PRECONDITIONINGS else "noise_pred"
        self.is_adaptive = self.solver.endswith("_adaptive")

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.g[f"run/{self.name}/{key}"]

    def get(self, key: str) -> torch.Tensor | None:
        return self.g.get(f"run/{self.name}/{key}")

    @property
    def noise(self) -> torch.Tensor:
        prefix = {"gauss": "gauss_", "t2i": "t2i_"}.get(self.model.split("_")[0], "")
        return self.g[f"{prefix}u_init"]

    def denoiser(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """D(x, sigma), with the guidance of the run."""
        kind, _, variant = self.model.partition("_")
        if kind == "gauss":
            mean, variance = self.g.meta["gaussian"]["mean"], self.g.meta["gaussian"]["std"] ** 2
            return lambda x, sigma: (variance * x + sigma**2 * mean) / (variance + sigma**2)
        if kind == "t2i":
            raw = network(self.g.meta["t2i_kwargs"], "t2i", self.g.below("t2i_state"))
            cond, null = self.g["context"], self.g["empty_context"].expand_as(self.g["context"])
        else:
            raw = network(self.g.meta["kwargs"], state=self.g.below("state"))
            cond, null = self.g["y"], torch.full_like(self.g["y"], self.g.meta["null_class"])
        net = Preconditioned(raw.requires_grad_(False), PRECONDITIONINGS[self.prediction](self.schedule), None)
        scale = float(variant.removeprefix("cfg")) if variant.startswith("cfg") else 0.0
        if self.prediction == "x0_pred" and self.solver.startswith("em_"):
            return self.with_published_rounding(lambda x, sigma: net(x, sigma, cond))
        if scale == 0:
            return lambda x, sigma: net(x, sigma, cond)
        guided = GuidedDenoiser(net, lambda x, sigma, _: net(x, sigma, null), 1 + scale)
        return lambda x, sigma: guided(x, sigma, cond)

    def with_published_rounding(self, D):
        """The denoiser whose noise, and score, are those that the published float32 computes from a clean image.

        The noise is u / std - x_0 / sigma, two large numbers near t = 0, where float32 leaves few digits of both factors:
        there they are taken from the tables.
        """
        prefix = {VP: "vp32", CosineVP: "cosine32"}[type(self.schedule)]
        table = TABLES.get(f"{prefix}/t", "t")
        assert table is not None

        def rounded(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            t = self.schedule.time(sigma)
            scale, std, snr = self.schedule.scale(t), self.schedule.std(t), sigma**-2
            at = (table - t).abs().argmin()
            if table[at].item() == pytest.approx(t.item(), rel=1e-6):
                std = TABLES[f"{prefix}/one_minus_alpha_bar"][at].double().sqrt()
                snr = TABLES[f"{prefix}/snr"][at].double()
            noise = scale * x.double() / std - snr.sqrt() * D(x, sigma).double()
            return x - scale * sigma**2 / std * noise

        return rounded

    def times(self, steps: int, spacing: str) -> torch.Tensor:
        """Knots from the time of the largest noise level to the run's last."""
        schedule = self.schedule
        first = schedule.last_time if isinstance(schedule, CosineVP) else 1.0
        last = self.options.get("eps", 1e-3)
        table = {VP: "solver_linear32", CosineVP: "solver_cosine32"}.get(type(schedule))
        if spacing == "log-snr" and table is not None:
            # In float32, lambda of the last time is less exact than the tolerance of labels.
            at = (TABLES[f"{table}/t"] - last).abs().argmin()
            assert TABLES[f"{table}/t"][at] == pytest.approx(last, rel=1e-6)
            last = float(schedule.time((-TABLES[f"{table}/lambda"][at].double()).exp()))
        return spaced_times(schedule, spacing, steps, first, last)

    def set_up(self):
        """Solver, grid and options."""
        o, schedule = self.options, self.schedule
        if self.solver.startswith("em_"):
            options = EulerMaruyama(stochastic=self.solver == "em_sde")
            return euler_maruyama, sde_grid(schedule, o["nfe"], o["eps"], o["T"]), options
        of_noise = self.solver.startswith("dpm_")
        prediction = "noise" if of_noise or not o.get("predict_x0", True) else "data"
        if self.is_adaptive:
            grid = time_grid(schedule, self.times(1, "time"))
            return adaptive, grid, AdaptiveDPMSolver(order=o["order"], prediction=prediction, common_step=True)
        order, fixed = o.get("order", 3), self.solver.endswith("_fixed")
        solver_type = o.get("solver_type", "dpm_solver").replace("_", "")
        options = DPMSolver(order=order, prediction=prediction, solver_type=solver_type, fixed_order=fixed)
        spacing = SPACINGS[o.get("skip_type", "logSNR" if of_noise else "time_uniform")]
        if of_noise or fixed:
            orders = singlestep_orders(o["steps"], order, fixed)
            grid = with_inner_levels(time_grid(schedule, self.times(len(orders), spacing)), orders)
        else:
            grid = time_grid(schedule, self.times(o["steps"], spacing))
        if o.get("denoise"):
            grid = Grid(torch.cat([grid.sigmas, grid.sigmas.new_zeros(1)]), start=grid.start)
        return (multistep if self.solver == "pp_multi" else singlestep), grid, options

    @property
    def tolerance(self) -> float:
        if self.is_adaptive:
            return TOLERANCES["adaptive"] * max(1, self.options["amplification"])
        if self.model == "gauss" and self.options.get("steps", 0) >= MANY_STEPS:
            return EXACT
        return TOLERANCES[self.solver.split("_")[0]]


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, g in FILES.items() for name in g.meta["runs"]])
def test_run(file, name, record_property):
    run = Run(FILES[file], name)
    solve, grid, options = run.set_up()
    denoiser, schedule = run.denoiser(), run.schedule
    if run.options.get("thresholding"):
        denoiser = ThresholdedDenoiser(lambda x, sigma, _, D=denoiser: D(x, sigma), limit=run.options["max_val"])
    draws = iter([] if run.get("draws") is None else run["draws"])
    calls, labels, trace = [], [], [run.noise]

    def D(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = schedule.time(sigma)
        labels.append(float(schedule.label(t).flatten()[0]))
        calls.append(x * schedule.scale(t).reshape(-1, *[1] * (x.ndim - 1) if t.ndim else []))
        return denoiser(x.float(), sigma).to(x)

    def after_update(x, sigma, _):
        trace.append(x * schedule.scale(schedule.time(sigma)).reshape(-1, *[1] * (x.ndim - 1) if sigma.ndim else []))
        return x

    x = run.noise.double() * grid.start
    x = solve(D, x, grid, options, randn_like=lambda _: next(draws), after_update=after_update)
    out = x * grid.end
    record_property("largest_error", error(out, run["out"]))
    assert error(out, run["out"]) <= run.tolerance
    assert next(draws, None) is None
    if run.is_adaptive:
        assert abs(len(labels) - run.options["nfe"]) <= 2 * run.options["order"]
        return
    assert len(labels) == run.options["nfe"]
    assert (torch.tensor(labels) - run["labels"]).abs().max() <= LABELS
    if run.get("x_calls") is not None:
        assert error(torch.stack(calls), run["x_calls"]) <= run.tolerance
    if run.get("trace") is not None:
        assert error(torch.stack(trace), run["trace"]) <= run.tolerance
