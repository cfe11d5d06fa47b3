"""Score-SDE models in the registry."""

from functools import partial

from torch import nn

from training.config.score_sde import ScoreNetwork, ScoreTraining
from training.config.score_sde_presets import SCORE_PRESETS
from training.families.architecture import Architecture, Sharing
from training.families.parts import flow_likelihood, from_data, profiles_and_ema, warmed_up_adam
from training.losses import ScoreLoss
from training.networks.ncsnv2 import RefineBlock, ResidualBlock
from training.networks.score_layers import AttnBlock, ResnetBlock
from training.networks.score_sde import ScoreSDE, schedule_for


def _objective(_net: nn.Module, config: ScoreTraining) -> ScoreLoss:
    chosen, network = config.objective, config.network
    return ScoreLoss(
        schedule_for(network),
        chosen.reduce_mean,
        chosen.likelihood_weighting,
        chosen.importance_sampling,
        network.pixel_range if chosen.dequantize else None,
    )


ENTRY = Architecture(
    family="score-SDE",
    paper="Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations* (ICLR 2021, "
    "[arXiv 2011.13456](https://arxiv.org/abs/2011.13456))",
    network_class=ScoreSDE,
    network=ScoreNetwork,
    make=from_data(ScoreSDE),
    training=ScoreTraining,
    presets=SCORE_PRESETS,
    objective=_objective,
    optimizer=warmed_up_adam,
    ema=partial(profiles_and_ema, ramp_up=True),
    core=lambda net: net.net,
    sharing=Sharing((ResnetBlock, AttnBlock, ResidualBlock, RefineBlock)),
    likelihood=flow_likelihood,
)
