"""Parts that entries of several families share: averages, optimisers, likelihoods."""

from collections.abc import Callable
from typing import Any

from torch import nn

from training.config.classifier import ClassifierTraining
from training.config.consistency import ConsistencyTraining
from training.config.edm2 import EDM2Training
from training.config.likelihood import LikelihoodConfig
from training.config.score_sde import ScoreTraining
from training.config.training import TrainConfig
from training.config.uvit import UViTTraining
from training.likelihood import FlowLikelihood
from training.lr import learning_rate_schedule, warmup_linear
from training.optimizers import EMA, AdamOptimizer
from training.phema import PowerFunctionEMA, ProfilesAndRampedEMA


def from_data(network_class: Callable[..., nn.Module]) -> Callable[[dict[str, Any], Any], nn.Module]:
    """`make` of networks that take the data first."""
    return lambda arguments, data: network_class(data, **arguments)


def power_function_ema(net: nn.Module, config: TrainConfig) -> PowerFunctionEMA:
    """Averages at the widths of `ema.ema_std`."""
    return PowerFunctionEMA(net, config.ema.ema_std)


def profiles_and_ema(
    net: nn.Module, config: ScoreTraining | UViTTraining | ClassifierTraining, *, ramp_up: bool
) -> EMA:
    """Averages at the widths of `ema.ema_std`, and the published one of decay `ema.ema_rate` where it is not 0."""
    if config.ema.ema_rate == 0:
        return PowerFunctionEMA(net, config.ema.ema_std)
    return ProfilesAndRampedEMA(net, config.ema.ema_std, config.ema.ema_rate, ramp_up)


def edm2_optimizer(net: nn.Module, config: EDM2Training | ConsistencyTraining) -> AdamOptimizer:
    """Adam under EDM2's learning rate schedule."""
    chosen = config.optimizer

    def learning_rate(nimg: int) -> float:
        return learning_rate_schedule(nimg, config.run.batch, chosen.lr, chosen.decay, chosen.rampup_Mimg)

    betas = (chosen.betas[0], chosen.betas[1])
    return AdamOptimizer(
        net,
        learning_rate,
        betas=betas,
        eps=chosen.eps,
        loss_scaling=config.run.ls,
        on_nonfinite=config.run.on_nonfinite,
    )


def warmed_up_adam(net: nn.Module, config: ScoreTraining | ClassifierTraining) -> AdamOptimizer:
    """Adam with linear warm-up, weight decay and clipped gradients, as score-SDE models are trained."""
    chosen = config.optimizer
    return AdamOptimizer(
        net,
        lambda nimg: warmup_linear(nimg, chosen.lr, chosen.warmup, chosen.decay_from, chosen.decay_to),
        betas=(chosen.beta1, 0.999),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        max_norm=chosen.grad_clip,
        loss_scaling=config.run.ls,
        on_nonfinite=config.run.on_nonfinite,
    )


def flow_likelihood(net: Any, config: LikelihoodConfig) -> FlowLikelihood:
    """Likelihoods by the probability-flow ODE."""
    return FlowLikelihood(net, config.flow)
