"""Encoders that are VAEs of diffusers."""

from collections.abc import Sequence
from typing import Any

import torch

from dnnlib.errors import UserError
from training.encoders.base import FINAL_STD, RandnLike, unwhiten, whiten
from training.encoders.models import PUBLISHED_VAE, ModelFiles
from training.encoders.vae import VAEEncoder

# Raw latents of the published VAE, of pixels in [0, 1], per channel.
PUBLISHED_MEAN = (5.81, 3.25, 0.12, -2.15)
PUBLISHED_STD = (4.17, 4.62, 3.71, 3.28)


class AutoencoderEncoder(VAEEncoder):
    """Latents of a VAE of diffusers, whitened per channel to mean 0 and standard deviation 0.5, or scaled.

    Args:
        vae_name: see `ModelFiles`; loaded when pixels are first needed.
        raw_mean, raw_std: statistics of the raw latents, per channel; empty = not known yet, see `measured`.
        batch_size: images per call of the VAE.
        vae_sha256: SHA-256 of its weights, which are compared when they are loaded; '' = any.
        scale, shift: final latents are (raw - shift) * scale, in place of whitening.
        pixel_range: the values of black and white that the VAE sees.
    """

    model_class = ""  # diffusers' name

    def __init__(
        self,
        vae_name: str,
        raw_mean: Sequence[float] = (),
        raw_std: Sequence[float] = (),
        batch_size: int = 8,
        vae_sha256: str = "",
        scale: float | None = None,
        shift: float = 0.0,
        pixel_range: Sequence[float] = (-1.0, 1.0),
    ):
        super().__init__(vae_name, vae_sha256, batch_size)
        self.scale, self.shift = scale, shift
        # One number stands for all channels.
        self.raw_mean = list(raw_mean) if scale is None else [shift]
        self.raw_std = list(raw_std) if scale is None else [FINAL_STD / scale]
        self.pixel_range = list(pixel_range)

    @property
    def init_kwargs(self) -> dict:
        kwargs = super().init_kwargs
        if self.scale is None:
            kwargs |= dict(raw_mean=self.raw_mean, raw_std=self.raw_std)
        else:
            kwargs |= dict(scale=self.scale, shift=self.shift)
        return {**kwargs, "pixel_range": self.pixel_range}

    def measured(self, raw_mean: Sequence[float], raw_std: Sequence[float]) -> "AutoencoderEncoder":
        """The same with statistics of raw latents."""
        return self._with(raw_mean=list(raw_mean), raw_std=list(raw_std))

    @property
    def is_measured(self) -> bool:
        """Whether the statistics are known."""
        return len(self.raw_std) > 0

    def fits(self, channels: int) -> bool:
        return self.scale is not None or len(self.raw_mean) == len(self.raw_std) == channels

    def final_channels(self, stored: int) -> int:
        return stored // 2 if self.distribution else stored

    def _files(self) -> ModelFiles:
        return ModelFiles(self.vae_name, self._named_by)

    def _load(self, files: ModelFiles) -> Any:
        return files.load(self.model_class).eval().requires_grad_(False)

    def downsampling(self) -> int:
        """Pixels per latent along a side. Errors as for `vae`."""
        raise NotImplementedError

    def check_images(self, source: str, channels: int, resolution: int) -> None:
        if channels != 3:
            raise UserError(f"{source}: holds {channels} channels of uint8, not RGB images")
        factor = self.downsampling()
        if resolution % factor != 0:
            raise UserError(
                f"{source}: the VAE needs a size divisible by {factor}, not {resolution}: convert the images to "
                "another --resolution"
            )

    def latent_channels(self) -> int:
        return self._loaded().config.latent_channels

    def scaled_as_configured(self) -> "AutoencoderEncoder":
        """The same, scaled and shifted by the numbers in the configuration of the VAE. Errors as for `vae`."""
        config = self._loaded().config
        return self.scaled(float(config.scaling_factor), float(config.get("shift_factor") or 0.0))

    def scaled(self, scale: float, shift: float = 0.0) -> "AutoencoderEncoder":
        """The same with a factor in place of statistics."""
        return self._with(scale=scale, shift=shift, raw_mean=[shift], raw_std=[FINAL_STD / scale])

    def describe(self) -> str:
        """The encoder in a few words."""
        black, white = self.pixel_range
        if self.scale is not None:
            what = f"(latents - {self.shift:g}) times {self.scale:g}" if self.shift else f"latents times {self.scale:g}"
        else:
            what = "latents whitened" + ("" if self.is_measured else " by statistics still to be measured")
        return f"{self.model_class} {self.vae_name}, pixels {black:g} to {white:g}, {what}"

    def _encoded(self, vae: Any, x: torch.Tensor) -> torch.Tensor:
        """Pixels as the VAE sees them -> raw latents."""
        raise NotImplementedError

    def encode_pixels(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        vae = self.vae(x.device)
        black, white = self.pixel_range
        with torch.inference_mode():
            parts = (part.float() / 255 * (white - black) + black for part in x.split(self.batch_size))
            return torch.cat([self._encoded(vae, part) for part in parts])

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        x = x.float()
        if self.distribution:
            mean, std = x.chunk(2, dim=1)
            x = mean + std * randn_like(mean)
        return whiten(x, self.raw_mean, self.raw_std)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.floats_to_pixels(self.raw_to_floats(unwhiten(x.float(), self.raw_mean, self.raw_std)))

    def raw_to_floats(self, raw: torch.Tensor) -> torch.Tensor:
        self.check_channels(raw.shape[1])
        vae = self.vae(raw.device)
        black, white = self.pixel_range
        with torch.inference_mode():
            pixels = torch.cat([vae.decode(part).sample for part in raw.split(self.batch_size)])
            return (pixels - black) / (white - black)


class StabilityVAEEncoder(AutoencoderEncoder):
    """Latents of an AutoencoderKL, by default those of Stability AI's VAE that the published 512x512 models use.

    Raw latents are mean and standard deviation of each channel, and final latents a draw from them. Pixels go in as
    [0, 1], as the published latents were made. Arguments as for `AutoencoderEncoder`.
    """

    model_class = "AutoencoderKL"
    distribution = True

    def __init__(
        self,
        vae_name: str = PUBLISHED_VAE,
        raw_mean: Sequence[float] = PUBLISHED_MEAN,
        raw_std: Sequence[float] = PUBLISHED_STD,
        batch_size: int = 8,
        vae_sha256: str = "",
        scale: float | None = None,
        shift: float = 0.0,
        pixel_range: Sequence[float] = (0.0, 1.0),
    ):
        super().__init__(vae_name, raw_mean, raw_std, batch_size, vae_sha256, scale, shift, pixel_range)

    def downsampling(self) -> int:
        return 2 ** (len(self._loaded().config.block_out_channels) - 1)

    def _encoded(self, vae: Any, x: torch.Tensor) -> torch.Tensor:
        distribution = vae.encode(x).latent_dist
        return torch.cat([distribution.mean, distribution.std], dim=1)


class AutoencoderDCEncoder(AutoencoderEncoder):
    """Latents of a deep compression autoencoder (Chen et al., arXiv 2410.10733), which are no distributions."""

    model_class = "AutoencoderDC"

    def downsampling(self) -> int:
        return 2 ** (len(self._loaded().config.encoder_block_out_channels) - 1)

    def _encoded(self, vae: Any, x: torch.Tensor) -> torch.Tensor:
        return vae.encode(x).latent
