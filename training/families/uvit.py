"""U-ViT in the registry."""

from functools import partial

from torch import nn

from training.config.uvit import UViTNetwork, UViTTraining
from training.config.uvit_presets import UVIT_PRESETS
from training.families.architecture import Architecture, Sharing
from training.families.parts import flow_likelihood, from_data, profiles_and_ema
from training.losses import NoiseLoss, WithoutSomeConditions
from training.lr import warmup_cosine, warmup_linear
from training.networks import uvit_cpu
from training.networks.uvit import Block
from training.networks.uvit_denoiser import UViTDenoiser, uvit_schedule
from training.optimizers import AdamOptimizer


def _objective(_net: nn.Module, config: UViTTraining) -> WithoutSomeConditions:
    chosen, prediction = config.objective, config.network.prediction
    loss = NoiseLoss(
        uvit_schedule(config.network),
        "data" if prediction == "data" else "noise",
        (chosen.P_mean, chosen.P_std) if chosen.noise_levels == "lognormal" else None,
    )
    return WithoutSomeConditions(loss, chosen.cond_dropout)


def _optimizer(net: nn.Module, config: UViTTraining) -> AdamOptimizer:
    chosen = config.optimizer

    def learning_rate(nimg: int) -> float:
        if chosen.decay_to == 0:
            return warmup_linear(nimg, chosen.lr, chosen.warmup)
        return warmup_cosine(nimg, chosen.decay_to, chosen.lr, warmup_nimg=chosen.warmup)

    return AdamOptimizer(
        net,
        learning_rate,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        decoupled=True,
        undecayed=("net.pos_embed", "net.label_emb.weight") if chosen.decay_exclude_embeddings else (),
        max_norm=chosen.grad_clip,
        loss_scaling=config.run.ls,
        on_nonfinite=config.run.on_nonfinite,
    )


ENTRY = Architecture(
    family="U-ViT",
    paper="Bao et al., *All are Worth Words: A ViT Backbone for Diffusion Models* (CVPR 2023, "
    "[arXiv 2209.12152](https://arxiv.org/abs/2209.12152))",
    network_class=UViTDenoiser,
    network=UViTNetwork,
    make=from_data(UViTDenoiser),
    training=UViTTraining,
    presets=UVIT_PRESETS,
    objective=_objective,
    optimizer=_optimizer,
    ema=partial(profiles_and_ema, ramp_up=False),
    core=lambda net: net.net,
    sharing=Sharing((Block,)),
    accelerate=uvit_cpu.for_sampling,
    likelihood=flow_likelihood,
)
