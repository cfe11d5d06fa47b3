"""The noisy classifier of score-SDE models in the registry."""

from functools import partial
from typing import Any

import torch
from torch import nn

from training.config.classifier import CLASSIFIER_PRESETS, ClassifierNetwork, ClassifierTraining
from training.families.architecture import Architecture
from training.families.parts import from_data, profiles_and_ema, warmed_up_adam
from training.flops import Inputs
from training.losses import ClassifierLoss
from training.networks.classifier import NoisyClassifier


def _objective(_net: nn.Module, _config: ClassifierTraining) -> ClassifierLoss:
    return ClassifierLoss()


def _inputs(net: Any, batch: int, device: torch.device | str) -> Inputs:
    return torch.zeros([batch, *net.spec.shape], device=device), torch.ones(batch, device=device)


ENTRY = Architecture(
    family="classifier",
    paper="Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations* (ICLR 2021, "
    "[arXiv 2011.13456](https://arxiv.org/abs/2011.13456))",
    network_class=NoisyClassifier,
    network=ClassifierNetwork,
    make=from_data(NoisyClassifier),
    inputs=_inputs,
    training=ClassifierTraining,
    presets=CLASSIFIER_PRESETS,
    objective=_objective,
    optimizer=warmed_up_adam,
    ema=partial(profiles_and_ema, ramp_up=True),
    makes_images=False,
)
