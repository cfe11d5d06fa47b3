"""Guidance: two denoisers combined into one, or a denoiser and a classifier."""

from training.guidance.classifier import ClassifierGuided
from training.guidance.denoisers import GuidedDenoiser, Unconditional, ZeroInit, guided
from training.guidance.weights import Weight, weight_of

__all__ = ["ClassifierGuided", "GuidedDenoiser", "Unconditional", "Weight", "ZeroInit", "guided", "weight_of"]
