"""Denoisers of the score-SDE family: a network of any published kind, and the SDE that it was trained on."""

import dataclasses
from typing import Any

from torch import nn

from training.conditioning import DataSpec
from training.config.score_sde import ScoreNetwork
from training.denoiser import Preconditioned
from training.networks.ncsnpp import DDPM, NCSNpp
from training.networks.ncsnv2 import NCSN, NCSNv2
from training.preconditioning import Epsilon
from training.schedules import VE, VP, DiscreteVE, DiscreteVP, Schedule, SubVP

MODELS: dict[str, type[nn.Module]] = {"ncsnpp": NCSNpp, "ddpm": DDPM, "ncsn": NCSN, "ncsnv2": NCSNv2}


def schedule_for(config: ScoreNetwork) -> Schedule:
    """The schedule of a network: that of its SDE, with its noise levels where they are discrete."""
    if config.sde == "ve":
        levels = config.sigma_min, config.sigma_max
        return VE(*levels) if config.continuous else DiscreteVE(*levels, config.num_scales)
    rates = config.beta_min, config.beta_max
    if config.sde == "subvp":
        return SubVP(*rates)
    return VP(*rates) if config.continuous else DiscreteVP(*rates, config.num_scales)


class ScoreSDE(Preconditioned):
    """The denoiser around the network of a score-SDE model (Song et al. 2021).

    Args:
        data: size of the images. Networks know no classes.
        precision: what the network computes in, 'fp32', 'bf16' or 'fp16'.
        arguments: fields of `config.score_sde.ScoreNetwork`.

    `net` is the raw network with its published keys. Images lie in [0, 1] where it is not `centered`, as `spec` says.

    Raises:
        UserError: arguments that do not go together.
    """

    def __init__(self, data: DataSpec, precision: str = "fp32", **arguments: Any):
        config = ScoreNetwork(**arguments)
        net = MODELS[config.model](data.resolution, data.channels, **config.raw_arguments)
        spec = dataclasses.replace(data, pixel_range=config.pixel_range)
        super().__init__(net, Epsilon(schedule_for(config)), spec, precision)
        self.init_kwargs = config.to_json()
