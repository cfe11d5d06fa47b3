"""What encoders that load a VAE have in common: where it is, its checksum, and whether it may be fetched."""

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dnnlib.errors import UserError
from training.encoders.base import Encoder, to_pixels
from training.encoders.models import absolute


class VAEFiles(Protocol):
    """The files of a VAE."""

    def sha256(self) -> str:
        """SHA-256 of the weights."""
        ...


class VAEEncoder(Encoder):
    """Latents of a VAE, which is loaded when pixels are first needed.

    Args:
        vae_name: where it is.
        vae_sha256: SHA-256 of its weights, which are compared when they are loaded; '' = any.
        batch_size: images per call of the VAE.
    """

    distribution = False  # whether raw latents are mean and standard deviation of what is drawn

    def __init__(self, vae_name: str, vae_sha256: str, batch_size: int):
        self.vae_name, self.vae_sha256, self.batch_size = vae_name, vae_sha256, batch_size
        self._named_by = ""
        self._vae: Any = None

    @property
    def init_kwargs(self) -> dict:
        kwargs = dict(vae_name=self.vae_name)
        return {**kwargs, "vae_sha256": self.vae_sha256} if self.vae_sha256 else kwargs

    def named_by(self, source: str) -> "VAEEncoder":
        """The same, whose VAE a file names, so that not everything may be fetched for it; '' = the user trusts it."""
        return self._with(_named_by=source)

    def with_vae(self, vae_name: str) -> "VAEEncoder":
        """An encoder of the same latents by a VAE that the user names."""
        return self._with(vae_name=absolute(vae_name), vae_sha256="", _named_by="", _vae=None)

    def identified(self) -> "VAEEncoder":
        """The same with the checksum of its VAE.

        Raises:
            UserError: the VAE is missing.
            RunError: it could not be downloaded now.
        """
        return self._with(vae_sha256=self._files().sha256())

    @property
    def is_measured(self) -> bool:
        """Whether the statistics of raw latents that it needs are known."""
        return True

    def measured(self, raw_mean: Sequence[float], raw_std: Sequence[float]) -> "VAEEncoder":
        """The same with statistics of raw latents."""
        raise NotImplementedError

    def _with(self, **attributes: Any) -> Any:
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def prepare(self, device: torch.device) -> None:
        self.vae(device)

    def vae(self, device: torch.device) -> Any:
        """The VAE on `device`.

        Raises:
            UserError: it is missing, damaged, or another than it should be, or a library is not installed.
            RunError: it could not be downloaded now.
        """
        return self._loaded().to(device)

    def _loaded(self) -> Any:
        if self._vae is None:
            files = self._files()
            if self.vae_sha256 and (actual := files.sha256()) != self.vae_sha256:
                raise UserError(
                    f"the VAE {self.vae_name} is another than {self._named_by or 'its record'} says (SHA-256 "
                    f"{actual[:12]}... instead of {self.vae_sha256[:12]}...): give the right one by --encoder"
                )
            self._vae = self._load(files)
        return self._vae

    def _files(self) -> VAEFiles:
        raise NotImplementedError

    def _load(self, files: Any) -> Any:
        raise NotImplementedError

    def latent_channels(self) -> int:
        """Channels of the VAE's latents. Errors as for `vae`."""
        raise NotImplementedError

    def check_channels(self, channels: int) -> None:
        """Check that latents of so many channels can be decoded. Errors as for `vae`, and:

        Raises:
            UserError: the VAE has another number.
        """
        if channels != self.latent_channels():
            raise UserError(
                f"the VAE {self.vae_name} has latents of {self.latent_channels()} channels, not {channels}: give the "
                "VAE that made them by --encoder"
            )

    def check_images(self, source: str, channels: int, resolution: int) -> None:
        """Check that uint8 images of a kind can be encoded. Errors as for `vae`, and:

        Raises:
            UserError: they cannot; begins with `source`.
        """
        raise NotImplementedError

    def raw_to_floats(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents (no distributions) -> pixels as the VAE gives them, brought to around [0, 1]."""
        raise NotImplementedError

    def floats_to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """What `raw_to_floats` gives -> uint8 pixels."""
        return to_pixels(x)
