"""The registry: one entry per architecture, with all that the rest of the code needs to know about it.

A new family is a module here, `networks/x.py`, `config/x.py` and `train_x.py`.
"""

from training.families.architecture import Architecture, denoiser_inputs
from training.families.registry import (
    ARCHITECTURES,
    accelerated,
    architecture_name,
    architecture_of,
    is_other_than_denoiser,
    preset_network,
    spec_of_preset,
    trained_by,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "accelerated",
    "architecture_name",
    "architecture_of",
    "denoiser_inputs",
    "is_other_than_denoiser",
    "preset_network",
    "spec_of_preset",
    "trained_by",
]
