"""Latents of an NVAE, which is a network of this project."""

import os
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch

from dnnlib.download import is_url
from dnnlib.errors import UserError
from training.encoders.base import FINAL_STD, RandnLike, StandardRGBEncoder
from training.encoders.vae import VAEEncoder, VAEFiles

SUFFIXES = (".safetensors", ".pt")  # of snapshots that can hold an NVAE


class NVAEFile(VAEFiles, Protocol):
    """The snapshot of an NVAE."""

    def load(self) -> Any:
        """The network with `encode` and `decode` (`training.snapshot.nvae_latents.NVAELatents`).

        Raises:
            UserError: it cannot be read, or holds another network.
        """
        ...


class NVAEEncoder(VAEEncoder):
    """Latents of all groups of an NVAE, as its decoder draws them: (z - mu) / sigma of each prior.

    Raw latents are draws from the posteriors: those of a group depend on those above it, so that no distribution of
    all of them could be stored. Their standard deviation is about 1, that of final latents FINAL_STD.
    Arguments as for `VAEEncoder`; the VAE is a snapshot file or a URL.
    """

    # Address -> its file, or None where no snapshot of this project is. `training.snapshot`, which stands above this
    # room and is needed to read one, sets it.
    open_file: ClassVar[Callable[[str], NVAEFile | None]]

    def __init__(self, vae_name: str, vae_sha256: str = "", batch_size: int = 256):
        super().__init__(vae_name, vae_sha256, batch_size)

    @classmethod
    def recognises(cls, vae_name: str) -> bool:
        """Whether a VAE that the user names is a snapshot of this project.

        Raises:
            UserError: it is one, and damaged.
            RunError: it could not be downloaded now.
        """
        if is_url(vae_name):
            return True
        return vae_name.endswith(SUFFIXES) and os.path.isfile(vae_name) and cls.open_file(vae_name) is not None

    def describe(self) -> str:
        return f"latents of the NVAE {self.vae_name}, times {FINAL_STD:g}"

    def _files(self) -> NVAEFile:
        failed = f"the VAE {self.vae_name} could not be loaded"
        if is_url(self.vae_name):
            if self._named_by:
                raise UserError(
                    f"{failed}: {self._named_by} names it, and it is not fetched unless you add --trust-encoder=1 (or "
                    "give your own: --encoder)"
                )
        elif not os.path.exists(self.vae_name):
            other = ": give --encoder with its place" if self._named_by else ""
            raise UserError(f"{failed}: no such file{other}")
        found = type(self).open_file(self.vae_name)
        if found is None:
            raise UserError(f"{failed}: it is no snapshot of this project")
        return found

    def _load(self, files: NVAEFile) -> Any:
        return files.load()

    def latent_channels(self) -> int:
        return self._loaded().channels

    def check_images(self, source: str, channels: int, resolution: int) -> None:
        self._loaded().check_images(source, channels, resolution)

    def encode_pixels(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        return self.vae(x.device).encode(x, randn_like)

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        return x.float() * FINAL_STD

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.floats_to_pixels(self.raw_to_floats(x.float() / FINAL_STD))

    def raw_to_floats(self, raw: torch.Tensor) -> torch.Tensor:
        self.check_channels(raw.shape[1])
        vae = self.vae(raw.device)
        return torch.cat([vae.decode(part) for part in raw.split(self.batch_size)])

    def floats_to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        return StandardRGBEncoder().decode(2 * x - 1)
