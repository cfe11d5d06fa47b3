"""Samplers: solvers that follow a denoiser along a grid of noise levels."""

from training.samplers.edm import StackedRandomGenerator, edm_sampler, ode_sampler

__all__ = ["StackedRandomGenerator", "edm_sampler", "ode_sampler"]
