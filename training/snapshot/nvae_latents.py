"""An NVAE between images and the latents of all its groups in one tensor, which a diffusion model can be trained on."""

import torch
import torch.nn.functional as F

from dnnlib.errors import DamagedFileError, UserError
from dnnlib.files import file_sha256
from training.encoders import RandnLike
from training.losses_vae import image_values
from training.networks.nvae import NVAE, Noise
from training.networks.nvae_layers import effective_weights
from training.snapshot.files import load_network, open_snapshot


class NVAESnapshot:
    """The snapshot of an NVAE, as `NVAEEncoder` opens it.

    Args:
        address: a file or URL.
    """

    def __init__(self, address: str):
        self.address = address

    def sha256(self) -> str:
        """SHA-256 of the file."""
        return file_sha256(open_snapshot(self.address).path)

    def load(self) -> "NVAELatents":
        """The network.

        Raises:
            UserError: it cannot be read, or holds another.
        """
        net = load_network(self.address).net
        if not isinstance(net, NVAE):
            raise UserError(f"{self.address}: holds a {type(net).__name__}, which has no latents: give an NVAE")
        return NVAELatents(net)


def find_nvae_snapshot(address: str) -> NVAESnapshot | None:
    """The snapshot at an address; None = a file of another kind.

    Raises:
        UserError: a damaged one.
        RunError: it could not be downloaded now.
    """
    try:
        open_snapshot(address)
    except DamagedFileError:
        raise
    except UserError:
        return None
    return NVAESnapshot(address)


class NVAELatents:
    """An NVAE that encodes images and decodes latents.

    Latents are (z - mu) / sigma of each prior. Those of all groups are stacked as channels at the highest resolution
    that a group has, [N, G Z, H, W], the top group first; those of a lower resolution are repeated, 2x2 or more times,
    and decoding takes the mean.

    Args:
        net: the network, in eval mode.
    """

    def __init__(self, net: NVAE):
        self.net = net
        self.channels = sum(shape[0] for shape in net.latent_shapes)
        self.resolution = max(shape[1] for shape in net.latent_shapes)

    def to(self, device: torch.device) -> "NVAELatents":
        """The same on another device."""
        self.net.to(device)
        return self

    def check_images(self, source: str, channels: int, resolution: int) -> None:
        """Check that images can be encoded.

        Raises:
            UserError: they differ from those of the network; begins with `source`.
        """
        spec = self.net.spec
        if (channels, resolution) != (spec.channels, spec.resolution):
            raise UserError(
                f"{source}: the NVAE knows images of {spec.resolution}x{spec.resolution}x{spec.channels}, not "
                f"{resolution}x{resolution}x{channels}: convert them"
            )

    def encode(self, images: torch.Tensor, randn_like: RandnLike) -> torch.Tensor:
        """Latents [N, G Z, H, W] of images, uint8 [N, C, R, R], drawn from the posteriors."""
        noise = randn_like(images.new_empty(len(images), self.net.noise_size, dtype=torch.float32))
        return self.pack(self.draws_of(images, randn_like, self.net.split_noise(noise)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Mean images [N, C, R, R] in [0, 1] of latents [N, G Z, H, W].

        Raises:
            UserError: latents of another size.
        """
        if latents.shape[2:] != (self.resolution, self.resolution):
            size = "x".join(map(str, latents.shape[2:]))
            raise UserError(f"the latents of the NVAE are {self.resolution}x{self.resolution}, not {size}")
        return self.images_of(self.unpack(latents))

    @torch.no_grad()
    def draws_of(self, images: torch.Tensor, randn_like: RandnLike, noise: Noise) -> list[torch.Tensor]:
        """Latents of each group [N, Z, h, w] of images, uint8 [N, C, R, R].

        Args:
            randn_like: source of normal draws for black and white images.
            noise: draws of the posteriors.
        """
        net = self.net
        with effective_weights(net):
            return net.prior_draws(image_values(net.decoder, images, net.loss_crop, randn_like), noise)

    @torch.no_grad()
    def images_of(self, draws: list[torch.Tensor]) -> torch.Tensor:
        """Mean images [N, C, R, R] in [0, 1] of the latents of each group."""
        net = self.net
        with effective_weights(net):
            return net.crop(net.decoder.mean(net.sample(len(draws[0]), noise=draws)))

    def pack(self, draws: list[torch.Tensor]) -> torch.Tensor:
        """Latents of each group [N, Z, h, w] in one tensor [N, G Z, H, W]."""
        return torch.cat([F.interpolate(z, size=(self.resolution, self.resolution)) for z in draws], dim=1)

    def unpack(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `pack`; of what differs where it was repeated, the mean."""
        shapes = self.net.latent_shapes
        parts = latents.split([shape[0] for shape in shapes], dim=1)
        return [F.avg_pool2d(part, self.resolution // shape[1]) for part, shape in zip(parts, shapes, strict=True)]
