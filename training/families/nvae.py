"""NVAE in the registry."""

from typing import Any

import torch
from torch import nn

from training.conditioning import DataSpec
from training.config.likelihood import LikelihoodConfig
from training.config.nvae import TRAINING_PRESETS as NVAE_PRESETS
from training.config.nvae import NVAENetwork, NVAETraining
from training.families.architecture import Architecture
from training.flops import Inputs
from training.generators import VAEGenerator, vae_pictures
from training.likelihood_vae import VAELikelihood
from training.losses_vae import PixelObjective
from training.networks import nvae_layers
from training.networks.nvae import NVAE
from training.optimizers import EMA, AdamaxOptimizer
from training.phema import LatestWeights, PowerFunctionEMA


def _network(arguments: dict[str, Any], data: DataSpec) -> NVAE:
    return NVAE(data.resolution + 2 * arguments.get("loss_crop", 0), data.channels, **arguments)


def _inputs(net: Any, batch: int, device: torch.device | str) -> Inputs:
    return (torch.zeros([batch, net.img_channels, net.img_resolution, net.img_resolution], device=device),)


def _objective(net: Any, config: NVAETraining) -> PixelObjective:
    schedules = config.objective.to_json()
    return PixelObjective(net, config.run.duration, **schedules, seed=config.run.seed).to(net.prior_ftr0.device)


def _ema(net: nn.Module, config: NVAETraining) -> EMA:
    return PowerFunctionEMA(net, config.ema.ema_std) if config.ema.ema_std else LatestWeights(net)


def _likelihood(net: Any, config: LikelihoodConfig) -> VAELikelihood:
    return VAELikelihood(net, config.vae.samples, config.vae.max_batch)


ENTRY = Architecture(
    family="NVAE",
    paper="Vahdat & Kautz, *NVAE: A Deep Hierarchical Variational Autoencoder* (NeurIPS 2020, "
    "[arXiv 2007.03898](https://arxiv.org/abs/2007.03898))",
    network_class=NVAE,
    network=NVAENetwork,
    make=_network,
    inputs=_inputs,
    training=NVAETraining,
    presets=NVAE_PRESETS,
    objective=_objective,
    optimizer=AdamaxOptimizer,
    ema=_ema,
    step=nvae_layers.effective_weights,
    generate=VAEGenerator,
    pictures=vae_pictures,
    likelihood=_likelihood,
)
