"""EDM2 in the registry."""

from functools import partial
from typing import Any

from torch import nn

from training.conditioning import Conditioning, DataSpec
from training.config.edm2 import TRAINING_PRESETS, EDM2Network, EDM2Training
from training.config.likelihood import LikelihoodConfig
from training.families.architecture import Architecture, Sharing
from training.families.parts import edm2_optimizer, power_function_ema
from training.likelihood import FlowLikelihood
from training.losses import EDM2Loss
from training.networks import edm2_cpu
from training.networks.edm2 import Block, Precond
from training.networks.edm2_layers import effective_weights, hold_effective_weights, shared_weights


def _objective(_net: nn.Module, config: EDM2Training) -> EDM2Loss:
    return EDM2Loss(config.objective.P_mean, config.objective.P_std, config.network.sigma_data)


def _network(arguments: dict[str, Any], data: DataSpec) -> Precond:
    return Precond(data.resolution, data.channels, data.conditioning.size, precision="fp32", **arguments)


def _take_data(kwargs: dict[str, Any]) -> DataSpec:
    conditioning = Conditioning.of_labels(kwargs.pop("label_dim"))
    return DataSpec(
        channels=kwargs.pop("img_channels"), resolution=kwargs.pop("img_resolution"), conditioning=conditioning
    )


def _likelihood(net: Any, config: LikelihoodConfig) -> FlowLikelihood:
    return FlowLikelihood(net, config.flow, effective_weights)


ENTRY = Architecture(
    family="EDM2",
    paper="Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models* (CVPR 2024, "
    "[arXiv 2312.02696](https://arxiv.org/abs/2312.02696))",
    network_class=Precond,
    network=EDM2Network,
    make=_network,
    training=EDM2Training,
    presets=TRAINING_PRESETS,
    objective=_objective,
    optimizer=edm2_optimizer,
    ema=power_function_ema,
    core=lambda net: net.unet,
    step=partial(effective_weights, normalize_first=True),
    sharing=Sharing((Block,), acting=shared_weights, hold=hold_effective_weights),
    accelerate=edm2_cpu.for_sampling,
    likelihood=_likelihood,
    take_data=_take_data,
)
