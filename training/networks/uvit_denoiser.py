"""Denoisers of the U-ViT family: a network, the noise that it was trained on, and what stands for no condition."""

import dataclasses
from typing import Any

import torch

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.config.uvit import UViTNetwork
from training.denoiser import Preconditioned
from training.networks.uvit import UViT
from training.preconditioning import Coefficients, DataPrediction, EDMOfSchedule, Epsilon, Preconditioning
from training.schedules import VP, Schedule
from training.schedules_uvit import CosineVP, InterpolatedVP


def uvit_schedule(config: UViTNetwork) -> Schedule:
    """The schedule of the noise that a network is trained on."""
    return {"continuous": VP, "cosine": CosineVP, "discrete": InterpolatedVP}[config.schedule]()


def _preconditioning(config: UViTNetwork) -> Preconditioning:
    schedule = uvit_schedule(config)
    if config.prediction == "edm":
        return EDMOfSchedule(schedule, config.sigma_data)
    return (Epsilon if config.prediction == "noise" else DataPrediction)(schedule)


def _raw_network(data: DataSpec, config: UViTNetwork) -> UViT:
    kind = data.conditioning.kind
    classes = data.conditioning.size + config.null_class if kind in ("classes", "vector") else -1
    text = kind == "tokens"
    return UViT(
        img_size=data.resolution,
        patch_size=config.patch_size,
        in_chans=data.channels,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        mlp_time_embed=config.mlp_time_embed,
        num_classes=classes,
        conv=config.conv,
        skip=config.skip,
        skip_norm=config.skip_norm,
        clip_dim=data.conditioning.size if text else 0,
        num_clip_token=data.conditioning.tokens if text else 0,
    )


def known_conditions(conditioning: Conditioning, config: UViTNetwork) -> Conditioning:
    """Conditions of a network, for those of its data: whether they are optional is a matter of the network."""
    optional = conditioning.kind == "tokens" or (conditioning.kind != "none" and config.null_class)
    return dataclasses.replace(conditioning, optional=optional)


class UViTDenoiser(Preconditioned):
    """The denoiser around a U-ViT (Bao et al. 2023).

    Args:
        data: size of the images, and what their conditions are: classes, texts or none.
        precision: what the network computes in, 'fp32', 'bf16' or 'fp16'.
        arguments: fields of `config.uvit.UViTNetwork`.

    `net` is the raw network with its published keys. Where images follow texts, `empty_context` [tokens, width] is what
    the empty text is to it.

    Raises:
        UserError: arguments that do not go together.
    """

    empty_context: torch.Tensor

    def __init__(self, data: DataSpec, precision: str = "fp32", **arguments: Any):
        config, conditioning = UViTNetwork(**arguments), data.conditioning
        spec = dataclasses.replace(data, conditioning=known_conditions(conditioning, config))
        super().__init__(_raw_network(data, config), _preconditioning(config), spec, precision)
        if conditioning.kind == "tokens":
            self.register_buffer("empty_context", torch.zeros(conditioning.shape))
        self.init_kwargs = config.to_json()

    def raw(
        self, x: torch.Tensor, sigma: torch.Tensor | float, cond: torch.Tensor | None = None, /
    ) -> tuple[torch.Tensor, Coefficients]:
        """As `Preconditioned.raw`.

        Args:
            cond: class vectors [N, classes], zeros for none; or as the raw network takes them, numbers of classes
                [N] or class vectors [N, K] with the null class; or contexts [N, tokens, width], zeros for the empty
                text. None = no condition for all images. A network that knows no conditions looks at none.
        """
        return super().raw(x, sigma, self._with_null(cond, len(x), x.device))

    def _with_null(self, cond: torch.Tensor | None, n: int, device: torch.device) -> torch.Tensor | None:
        """Conditions as the raw network takes them."""
        conditioning: Conditioning = self.spec.conditioning
        if conditioning.kind == "none":
            return None
        if cond is None:
            if not conditioning.optional:
                raise UserError("this network knows no images without a class: give it one for each")
            cond = conditioning.null(n, device)
            assert cond is not None
        is_numbers = not cond.is_floating_point()
        if is_numbers or not conditioning.optional or cond.shape[1:] != conditioning.shape:
            return cond
        missing = (cond == 0).flatten(1).all(1)
        if conditioning.kind == "tokens":
            return torch.where(missing[:, None, None], self.empty_context.to(cond), cond)
        return torch.cat([cond, missing.to(cond)[:, None]], dim=1)
