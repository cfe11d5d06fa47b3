"""Denoisers in the forms that other projects give them: ours for theirs, and theirs for ours."""

from training.adapters.deepinv import ForDeepInverse
from training.adapters.k_diffusion import ForKDiffusion, OfKDiffusion

__all__ = ["ForDeepInverse", "ForKDiffusion", "OfKDiffusion"]
