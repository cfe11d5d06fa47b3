"""The published name of EDM2's networks; they are in `training.networks.edm2`."""

from training.networks.edm2 import Block, Precond, UNet
from training.networks.edm2_layers import (
    MPConv,
    MPFourier,
    effective_weights,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights_,
    resample,
)

__all__ = [
    "Block",
    "MPConv",
    "MPFourier",
    "Precond",
    "UNet",
    "effective_weights",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize",
    "normalize_weights_",
    "resample",
]
