"""Bounds on the likelihood of images under NVAE.

Vahdat & Kautz 2020 (arXiv 2007.03898), section 4 and appendix A; importance weighting: Burda et al. 2016,
"Importance Weighted Autoencoders" (arXiv 1509.00519).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import UserError
from training.losses_vae import image_values, reconstruction_loss
from training.networks.nvae import NVAE
from training.networks.nvae_distributions import RandnLike
from training.networks.nvae_layers import effective_weights


@dataclass(frozen=True)
class Bounds:
    """Figures of N images from K importance samples each, in nats, float64.

    Attributes:
        recon: -log p(x | z) [N], mean over the samples.
        kl: KL divergence of each group [N, G], the top one first, mean over the samples.
        neg_log_p: importance-weighted upper bound of -log p(x) [N]: -log of the mean of p(x | z) p(z) / q(z | x).
        dims: values of an image, for `bits_per_dim`.
    """

    recon: torch.Tensor
    kl: torch.Tensor
    neg_log_p: torch.Tensor
    dims: int

    @property
    def nelbo(self) -> torch.Tensor:
        """Negative evidence lower bound [N]."""
        return self.recon + self.kl.sum(dim=1)

    def bits_per_dim(self, nats: torch.Tensor) -> torch.Tensor:
        """Nats per image as bits per dimension."""
        return nats / (self.dims * math.log(2))


@torch.no_grad()
def importance_bounds(
    net: NVAE, x: torch.Tensor, num_samples: int, randn_like: RandnLike = torch.randn_like, max_batch: int = 128
) -> Bounds:
    """Bounds of images from `num_samples` draws of their posteriors each.

    The encoder runs once per image, the decoder once per draw, up to `max_batch` draws together. The draws come one
    sample after another, all groups of each, so that neither `max_batch` nor (with a generator per image) the other
    images change a result.

    Args:
        net: in eval mode.
        x: images [N, C, R, R] with values in [0, 1].
        num_samples: K.
        randn_like: source of normal draws [N, Z, H, W].
        max_batch: images times samples that go through the decoder together: bounds the memory. At least N.
    """
    assert not net.training
    N, K = len(x), num_samples
    together = max(max_batch // N, 1)
    recon = x.new_zeros(N, dtype=torch.float64)
    kl = x.new_zeros(N, net.num_groups, dtype=torch.float64)
    log_sum = x.new_full([N], -math.inf, dtype=torch.float64)
    templates = [x.new_empty(N, *shape, dtype=torch.float32) for shape in net.latent_shapes]
    with effective_weights(net):
        features = net.encode(x)
        for start in range(0, K, together):
            k = min(together, K - start)
            draws = [[randn_like(template) for template in templates] for _ in range(k)]
            noise = [torch.stack(group, dim=1).flatten(0, 1) for group in zip(*draws, strict=True)]
            out = net.decode(features, noise, repeat=k)
            losses = reconstruction_loss(net, out.logits, x.repeat_interleave(k, dim=0)).double()
            recon += losses.reshape(N, k).sum(dim=1)
            kl += out.kl_all.double().reshape(N, k, -1).sum(dim=1)
            log_w = (out.log_p.double() - out.log_q.double() - losses).reshape(N, k)
            log_sum = torch.logaddexp(log_sum, log_w.logsumexp(dim=1))
    return Bounds(recon / K, kl / K, math.log(K) - log_sum, net.dims)


class VAELikelihood:
    """Bounds on the likelihood of images: a `Likelihood`.

    Args:
        net: in eval mode.
        num_samples: importance samples per image; with 1, the bound is the evidence lower bound of one draw.
        max_batch: see `importance_bounds`.

    Raises:
        UserError: `num_samples` or `max_batch` below 1.
    """

    section = "vae"

    def __init__(self, net: NVAE, num_samples: int, max_batch: int = 128):
        for name, value in (("num_samples", num_samples), ("max_batch", max_batch)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        self.net, self.num_samples, self.max_batch = net, num_samples, max_batch

    def bounds(self, images: torch.Tensor, rnd: Any = None) -> Bounds:
        """All figures of images.

        Args:
            images: uint8 [N, C, H, W], or values in [0, 1]; see `losses_vae.image_values`.
            rnd: source of random numbers, `rnd.randn_like(x)`; torch's if None.
        """
        randn_like = torch.randn_like if rnd is None else rnd.randn_like
        x = image_values(self.net.decoder, images, self.net.loss_crop, randn_like)
        return importance_bounds(self.net, x, self.num_samples, randn_like, self.max_batch)

    def __call__(self, images: torch.Tensor, rnd: Any = None, cond: None = None) -> torch.Tensor:
        """Bits per dimension of each image [N], float64: the importance-weighted bound. Arguments as for `bounds`."""
        bounds = self.bounds(images, rnd)
        return bounds.bits_per_dim(bounds.neg_log_p)

    def figures(self, images: torch.Tensor, rnd: Any = None, cond: None = None) -> dict[str, torch.Tensor]:
        """Figures of each image [N] by name, float64. Arguments as for `bounds`.

        bits_per_dim: the importance-weighted bound, and nelbo_bits_per_dim: the negative evidence lower bound; in nats:
        iw_bound, nelbo, recon (-log p(x | z)), kl_00, kl_01, ... (of the groups, the top one first).
        """
        b = self.bounds(images, rnd)
        return {
            "bits_per_dim": b.bits_per_dim(b.neg_log_p),
            "nelbo_bits_per_dim": b.bits_per_dim(b.nelbo),
            "iw_bound": b.neg_log_p,
            "nelbo": b.nelbo,
            "recon": b.recon,
            **{f"kl_{i:02d}": kl for i, kl in enumerate(b.kl.unbind(dim=1))},
        }

    def describe(self) -> dict[str, Any]:
        """What computes the bounds, as plain JSON values."""
        decoder = self.net.decoder
        return {
            "likelihood": "bounds of a VAE",
            "samples": self.num_samples,
            "levels": decoder.levels,
            "dims": self.net.dims,
            "precision": self.net.precision,
        }
