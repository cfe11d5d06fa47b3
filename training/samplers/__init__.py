"""Samplers: solvers that follow a denoiser along a grid of noise levels."""

from training.samplers.edm import edm_sampler, ode_sampler
from training.samplers.noise import StackedRandomGenerator
from training.samplers.sampler import Sampler

__all__ = ["Sampler", "StackedRandomGenerator", "edm_sampler", "ode_sampler"]
