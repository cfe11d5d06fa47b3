"""Encoders between stored data (pixels or raw latents) and what the diffusion model sees."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib.download import OFFLINE_VARIABLE, offline, open_url
from dnnlib.errors import RunError, UserError, one_line
from training.conditioning import Conditioning, DataSpec
from training.config.data import HUGE, TINY
from training.dataset.images import ImageFolderDataset
from training.dataset.order import evenly_spaced

RandnLike = Callable[[torch.Tensor], torch.Tensor]
PUBLISHED_VAE = "stabilityai/sd-vae-ft-mse"  # of the published models
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # in a folder or repository
HUB_NAME = r"\w[\w.-]*/[\w.-]+"  # owner/repo

FINAL_STD = 0.5  # standard deviation that latents are brought to: sigma_data of the published models


class Encoder:
    """Pixels <-> raw latents (as stored in datasets) <-> final latents (float32, what the model sees)."""

    def output_suffix(self, channels: int) -> str:
        """File type of decoded final latents with that many channels: '.png' or '.npy'."""
        return ".png"

    def prepare(self, device: torch.device) -> None:
        """Download and load what `encode_pixels` and `decode` would otherwise load when first called.

        Raises:
            UserError: something is missing or damaged.
            RunError: something could not be downloaded now.
        """

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [N, C, H, W] -> raw latents."""
        raise NotImplementedError

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        """Raw latents -> final latents; `randn_like` draws where the raw latents describe a distribution."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        """uint8 pixels [N, C, H, W] -> final latents."""
        return self.encode_latents(self.encode_pixels(x), randn_like)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Final latents -> uint8 pixels (or float32 raw latents where there are no pixels)."""
        raise NotImplementedError

    @property
    def init_kwargs(self) -> dict:
        """Arguments that build an equal encoder, as plain JSON values."""
        return {}


class StandardRGBEncoder(Encoder):
    """uint8 pixels of any channel count <-> [low, high]."""

    def __init__(self, low: float = -1.0, high: float = 1.0):
        self.low, self.high = low, high

    @property
    def init_kwargs(self) -> dict:
        return {} if (self.low, self.high) == (-1, 1) else dict(low=self.low, high=self.high)

    def output_suffix(self, channels: int) -> str:
        return ".png" if channels <= 4 else ".npy"  # PNG ends at RGBA

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        return x.float() / (255 / (self.high - self.low)) + self.low

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        scale = 255 / (self.high - self.low)
        return (x.float() * scale + (0.5 - self.low * scale)).clip(0, 255).to(torch.uint8)


class StabilityVAEEncoder(Encoder):
    """Latents of Stability AI's VAE, as the published 512x512 models use them.

    Raw latents are 8 channels: mean and standard deviation of 4. Final latents are a draw from them, whitened to
    mean 0 and standard deviation 0.5. Pixels go in as [0, 1], as the published latents were made.

    Args:
        vae_name: a diffusers AutoencoderKL, loaded when pixels are first needed: a name on the Hugging Face hub, a
            folder, or a .safetensors file (beside its config.json, or with the configuration of the published VAE).
        raw_mean, raw_std: statistics of the raw latents, per channel.
        batch_size: images per call of the VAE.
    """

    def __init__(
        self,
        vae_name: str = PUBLISHED_VAE,
        raw_mean: Sequence[float] = (5.81, 3.25, 0.12, -2.15),
        raw_std: Sequence[float] = (4.17, 4.62, 3.71, 3.28),
        batch_size: int = 8,
    ):
        self.vae_name = vae_name
        self.raw_mean = list(raw_mean)
        self.raw_std = list(raw_std)
        self.batch_size = batch_size
        self._vae: Any = None

    @property
    def init_kwargs(self) -> dict:
        return dict(vae_name=self.vae_name, raw_mean=self.raw_mean, raw_std=self.raw_std)

    def prepare(self, device: torch.device) -> None:
        self.vae(device)

    def vae(self, device: torch.device) -> Any:
        """The VAE on `device`.

        Raises:
            UserError: diffusers is not installed, or the VAE is missing or damaged.
            RunError: it could not be downloaded now.
        """
        if self._vae is None:
            self._vae = _load_vae(self.vae_name).eval().requires_grad_(False)
        return self._vae.to(device)

    def encode_pixels(self, x: torch.Tensor) -> torch.Tensor:
        vae = self.vae(x.device)
        with torch.inference_mode():
            parts = [vae.encode(part.float() / 255).latent_dist for part in x.split(self.batch_size)]
            return torch.cat([torch.cat([d.mean, d.std], dim=1) for d in parts])

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        mean, std = x.float().chunk(2, dim=1)
        return whiten(mean + std * randn_like(mean), self.raw_mean, self.raw_std)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return to_pixels(self.decode_to_floats(x))

    def decode_to_floats(self, x: torch.Tensor) -> torch.Tensor:
        """Final latents -> pixels as the VAE gives them, around [0, 1]."""
        vae = self.vae(x.device)
        with torch.inference_mode():
            raw = unwhiten(x.float(), self.raw_mean, self.raw_std)
            return torch.cat([vae.decode(part).sample for part in raw.split(self.batch_size)])


def _load_vae(name: str) -> Any:
    """The VAE of a file, a folder or the hub, see `StabilityVAEEncoder`."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("converting between pixels and latents needs diffusers: pip install diffusers") from None
    failed = f"the VAE {name} could not be loaded"
    is_file = name.endswith(".safetensors")
    if not os.path.exists(name) and (is_file or re.fullmatch(HUB_NAME, name) is None):
        raise UserError(f"{failed}: no such file or folder (a name on the hub would be owner/repo)")
    try:
        if not is_file:
            folder = name if os.path.exists(name) else _hub_folder(name, VAE_FILES)
        else:
            folder = os.path.dirname(name) or "."
            if not os.path.isfile(os.path.join(folder, "config.json")):
                folder = _hub_folder(PUBLISHED_VAE, ["config.json"])
    except (UserError, RunError) as err:
        reason = err
        if is_file:
            reason = f"no config.json beside it, and that of {PUBLISHED_VAE} is not available: put its own beside it"
        raise type(err)(f"{failed}: {reason}") from None
    # Not its default low_cpu_mem_usage, which asks for another package in five lines.
    options = dict(low_cpu_mem_usage=False, local_files_only=True)
    try:
        if is_file:
            return AutoencoderKL.from_single_file(name, config=folder, **options)
        loaded: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except Exception as err:  # diffusers has errors of its own, and torch's where shapes differ
        raise UserError(f"{failed}: {one_line(str(err).strip())[:200]}") from None
    vae, found = loaded
    if found["missing_keys"]:  # which diffusers fills with random numbers
        first = ", ".join(sorted(found["missing_keys"])[:3])
        raise UserError(f"{failed}: it lacks {len(found['missing_keys'])} weights, such as {first}: copy it again")
    return vae


def _hub_folder(repo: str, files: Sequence[str]) -> str:
    """The folder in huggingface_hub's cache that holds these files, downloaded if they are not there yet.

    Raises:
        UserError: they are missing from the hub, or from the cache when offline.
        RunError: they could not be downloaded now.
    """
    urls = [f"hf://{repo}/{file}" for file in files]
    advice = (
        f"run python snapshot_tool.py prefetch {' '.join(urls)} where there is a network, "
        "and copy huggingface_hub's cache (HF_HOME) from there for --offline"
    )
    try:
        paths = [open_url(url, return_filename=True) for url in urls]
    except RunError as err:
        raise RunError(f"{err}; {advice}") from None
    except UserError:
        if not offline():
            raise
        raise UserError(
            f"downloads are off ({OFFLINE_VARIABLE}=1), and it is not in huggingface_hub's cache; {advice}"
        ) from None
    return os.path.dirname(paths[0])


class RawLatentEncoder(Encoder):
    """Latents of unknown origin, whitened per channel with stored statistics; there are no pixels.

    Args:
        raw_mean, raw_std: statistics of the raw latents, per channel.
    """

    def output_suffix(self, channels: int) -> str:
        return ".npy"

    def __init__(self, raw_mean: Sequence[float], raw_std: Sequence[float]):
        self.raw_mean = list(raw_mean)
        self.raw_std = list(raw_std)

    @property
    def init_kwargs(self) -> dict:
        return dict(raw_mean=self.raw_mean, raw_std=self.raw_std)

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        return whiten(x.float(), self.raw_mean, self.raw_std)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return unwhiten(x.float(), self.raw_mean, self.raw_std)


def to_pixels(x: torch.Tensor) -> torch.Tensor:
    """Floats around [0, 1], clamped to it, -> uint8 pixels."""
    return (x.clamp(0, 1) * 255).to(torch.uint8)


def whiten(x: torch.Tensor, raw_mean: Sequence[float], raw_std: Sequence[float]) -> torch.Tensor:
    """[N, C, H, W] with the given statistics per channel -> mean 0, standard deviation 0.5."""
    return (x - _channels(raw_mean, x)) / _channels(raw_std, x) * FINAL_STD


def unwhiten(x: torch.Tensor, raw_mean: Sequence[float], raw_std: Sequence[float]) -> torch.Tensor:
    """The inverse of `whiten`."""
    return x / FINAL_STD * _channels(raw_std, x) + _channels(raw_mean, x)


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)


ENCODERS: dict[str, type[Encoder]] = {
    cls.__name__: cls for cls in (StandardRGBEncoder, StabilityVAEEncoder, RawLatentEncoder)
}


def encoder_for(
    dataset: ImageFolderDataset, max_items: int = 10000, pixel_range: tuple[float, float] = (-1.0, 1.0)
) -> Encoder:
    """The encoder that suits a dataset's contents.

    Pixels: `StandardRGBEncoder`; 8-channel latents: `StabilityVAEEncoder`; other latents: `RawLatentEncoder` with
    the statistics of up to `max_items` evenly spaced items. `pixel_range` is what black and white are to the network.

    Raises:
        UserError: a channel of the latents is constant, or holds numbers that are far too large.
    """
    if dataset.dtype == np.uint8:
        return StandardRGBEncoder(*pixel_range)
    if final_channels(dataset) != dataset.num_channels:
        return StabilityVAEEncoder()
    indices = evenly_spaced(len(dataset), max_items)
    moments = np.zeros([2, dataset.num_channels])
    largest, largest_name = 0.0, ""
    for idx in indices:
        image = dataset[int(idx)][0].astype(np.float64)
        moments += [image.mean(axis=(1, 2)), np.square(image).mean(axis=(1, 2))]
        if np.abs(image).max() > largest:
            largest, largest_name = np.abs(image).max(), dataset.name(int(idx))
    mean, mean_square = moments / len(indices)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    if not TINY <= std.min() <= std.max() <= HUGE:
        raise UserError(
            f"{dataset.path}: the latents must be of moderate size and not constant (mean {mean}, standard deviation "
            f"{std} per channel; the largest number is {largest:g}, in {largest_name}): encode them again"
        )
    return RawLatentEncoder(mean.tolist(), std.tolist())


def final_channels(dataset: ImageFolderDataset) -> int:
    """Number of channels the model sees."""
    vae_latents = dataset.dtype != np.uint8 and dataset.num_channels == 8
    return dataset.num_channels // 2 if vae_latents else dataset.num_channels


def data_spec(dataset: ImageFolderDataset) -> DataSpec:
    """What the model sees of a dataset."""
    conditioning = Conditioning.of_labels(dataset.label_dim)
    return DataSpec(channels=final_channels(dataset), resolution=dataset.resolution, conditioning=conditioning)
