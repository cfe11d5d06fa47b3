"""Training objective of NVAE: the evidence lower bound with annealed and balanced KL terms, and its regularisers.

Vahdat & Kautz 2020 (arXiv 2007.03898), sections 3.2 and 3.3 and appendix A. Schedules that were published in steps are
functions of the number of images seen.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils import distributed

FIRST_ITERATIONS, ITERATIONS = 40, 4  # of the power method: at its first use, and at each one
POWER_EPS = 1e-3  # smallest norm that its vectors are divided by
KL_OFFSET = 0.01  # nats, added to each group's KL when terms are balanced
ACTIVE_KL = 0.1  # nats; a latent channel with more KL is active


# ---------------------------------------------------------------------------------------------------------
# Schedules


def kl_coefficient(
    nimg: int,
    total_nimg: int,
    anneal_portion: float = 0.3,
    const_portion: float = 1e-4,
    const_coeff: float = 1e-4,
) -> float:
    """Weight beta of the KL term: `const_coeff` first, then linear to 1 during `anneal_portion` of the training.

    Args:
        nimg: images seen before the step.
        total_nimg: images of the whole training.
        const_portion: part of the training before the annealing begins.
    """
    progress = (nimg - const_portion * total_nimg) / (anneal_portion * total_nimg)
    return max(min(progress, 1.0), const_coeff)


def annealed_weight(beta: float, initial: float, final: float) -> float:
    """Weight of the regularisers, geometrically between `initial` (beta = 0) and `final` (beta = 1)."""
    return math.exp((1 - beta) * math.log(initial) + beta * math.log(final))


# ---------------------------------------------------------------------------------------------------------
# KL terms


def balancing_factors(groups_per_scale: Sequence[int]) -> list[float]:
    """alpha of each group, the top one first (appendix A): positions per group of its scale, where the least is 1.

    Args:
        groups_per_scale: groups of each scale, the highest resolution first.
    """
    scales = [4**i / count for i, count in enumerate(reversed(groups_per_scale))]
    least = min(scales)
    return [a / least for a, count in zip(scales, reversed(groups_per_scale), strict=True) for _ in range(count)]


def balanced_kl(kl_all: torch.Tensor, alpha: Sequence[float], beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """KL term of each image [N], and the coefficient of each group [G].

    While beta < 1, groups with much KL for their size get a larger coefficient, so that all of them come into use; the
    mean coefficient is 1, and no gradient flows through it. KL of a single sample can be negative, hence the absolute
    value in what the coefficients are made of.

    Args:
        kl_all: KL of each image and group [N, G].
        alpha: `balancing_factors`.
        beta: weight of the KL term.
    """
    if beta >= 1:
        return kl_all.sum(dim=1), kl_all.new_ones(kl_all.shape[1])
    with torch.no_grad():
        per_group = distributed.all_reduce_sum_(kl_all.abs().mean(dim=0)) / distributed.get_world_size() + KL_OFFSET
        coeffs = per_group / kl_all.new_tensor(alpha)
        coeffs *= len(coeffs) / coeffs.sum()
    return beta * (kl_all @ coeffs), coeffs


# ---------------------------------------------------------------------------------------------------------
# Regularisers


def max_abs_scales(scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over batch norms of max |gamma| []."""
    by_size: dict[int, list[torch.Tensor]] = {}
    for gamma in scales:
        by_size.setdefault(len(gamma), []).append(gamma)
    # `max`, not `amax`, whose gradient is shared by all of the largest: at first, that is all of them.
    return torch.stack([torch.stack(g).float().abs().max(dim=1).values.sum() for g in by_size.values()]).sum()


class SpectralNorms(nn.Module):
    """Sum of the largest singular values of a network's weights, by the power method.

    Its vectors u and v are kept from call to call as buffers, so a state dict with them continues exactly. Matrices of
    one shape are treated together. Everything is in float32 whatever the autocast.

    Args:
        shapes: number of matrices of each shape (rows, columns).
        seed: of the first vectors.
    """

    started: torch.Tensor

    def __init__(self, shapes: Mapping[tuple[int, int], int], seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for (rows, columns), count in shapes.items():
            for name, size in (("u", rows), ("v", columns)):
                start = F.normalize(torch.randn(count, size, generator=generator), dim=1, eps=POWER_EPS)
                self.register_buffer(f"{name}_{rows}x{columns}", start)
        self.register_buffer("started", torch.tensor(False))

    def forward(self, stacks: Mapping[tuple[int, int], torch.Tensor]) -> torch.Tensor:
        """Sum of the norms [], with gradients for the weights.

        Args:
            stacks: matrices [count, rows, columns] of each shape.
        """
        iterations = ITERATIONS if self.started else FIRST_ITERATIONS
        self.started.fill_(True)
        with torch.autocast(next(iter(stacks.values())).device.type, enabled=False):
            return torch.stack([self._norms(shape, w.float(), iterations).sum() for shape, w in stacks.items()]).sum()

    def _norms(self, shape: tuple[int, int], w: torch.Tensor, iterations: int) -> torch.Tensor:
        u, v = (self.get_buffer(f"{name}_{shape[0]}x{shape[1]}") for name in "uv")
        with torch.no_grad():
            transposed = w.transpose(1, 2)
            left, right = u.unsqueeze(2), v.unsqueeze(2)
            for _ in range(iterations):
                right = F.normalize(transposed @ left, dim=1, eps=POWER_EPS)
                left = F.normalize(w @ right, dim=1, eps=POWER_EPS)
            u.copy_(left.squeeze(2))
            v.copy_(right.squeeze(2))
        return (left * (w @ right)).sum(dim=(1, 2))


# ---------------------------------------------------------------------------------------------------------
# Images and objective


def image_values(decoder: Any, images: torch.Tensor, pad: int = 0, randn_like: Any = torch.randn_like) -> torch.Tensor:
    """Images with values in [0, 1] as a decoder expects them, float32.

    Levels are floor(u L / 256) / (L - 1) for L levels. Black and white images are drawn: a pixel is white with
    probability u / 255.

    Args:
        decoder: its `levels` count.
        images: uint8 [N, C, H, W]; floating-point ones are taken as they are.
        pad: width of a black border that is added to uint8 images.
        randn_like: source of normal draws for black and white images.
    """
    if images.dtype != torch.uint8:
        return images.float()
    images = F.pad(images, [pad] * 4)
    if decoder.levels == 2:
        p = images.float() / 255
        return binarize(p, torch.special.ndtr(randn_like(p)))
    return torch.div(images.int() * decoder.levels, 256, rounding_mode="floor").float() / (decoder.levels - 1)


def binarize(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Black and white pixels, 1 with probability p, made of uniform draws of the same shape."""
    return (uniform < p).float()


def reconstruction_loss(net: Any, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """-log p(x | z) of each image in nats [N], without the border that `net.loss_crop` names."""
    log_prob = net.decoder.log_prob(logits, x)
    c = net.loss_crop
    return -log_prob[:, :, c : log_prob.shape[2] - c, c : log_prob.shape[3] - c].sum(dim=(1, 2, 3))


class VAEObjective(nn.Module):
    """Objective of NVAE: mean of the losses per image, plus `regularizer`.

    Its buffers are the state of the power method.

    Args:
        net: the network that is trained.
        total_nimg: images of the whole training, which schedules refer to.
        kl_anneal_portion, kl_const_portion, kl_const_coeff: see `kl_coefficient`.
        weight_decay_norm: weight lambda of the spectral norms and batch norm scales; 0 leaves them out.
        weight_decay_norm_init: where lambda starts, if it is annealed.
        weight_decay_norm_anneal: anneal lambda as beta rises.
        seed: of the power method.
    """

    def __init__(
        self,
        net: Any,
        total_nimg: int,
        *,
        kl_anneal_portion: float = 0.3,
        kl_const_portion: float = 1e-4,
        kl_const_coeff: float = 1e-4,
        weight_decay_norm: float = 0.0,
        weight_decay_norm_init: float = 10.0,
        weight_decay_norm_anneal: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.total_nimg = total_nimg
        self.kl_schedule = (kl_anneal_portion, kl_const_portion, kl_const_coeff)
        self.weight_decay_norm = weight_decay_norm
        self.weight_decay_norm_init = weight_decay_norm_init
        self.weight_decay_norm_anneal = weight_decay_norm_anneal
        self.alpha = balancing_factors(net.groups_per_scale)
        self.nats_per_bpd = net.dims * math.log(2)
        with torch.no_grad():
            shapes = {shape: len(stack) for shape, stack in net.weight_stacks().items()}
        self.spectral_norms = SpectralNorms(shapes, seed)
        self._report: dict[str, Any] = {}

    def beta(self, nimg: int) -> float:
        """Weight of the KL term."""
        return kl_coefficient(nimg, self.total_nimg, *self.kl_schedule)

    def regularizer_weight(self, nimg: int) -> float:
        """lambda."""
        if not self.weight_decay_norm_anneal:
            return self.weight_decay_norm
        return annealed_weight(self.beta(nimg), self.weight_decay_norm_init, self.weight_decay_norm)

    def forward(
        self, net: Any, images: torch.Tensor, cond: None = None, *, rnd: Any = None, nimg: int, noise: Any = None
    ) -> torch.Tensor:
        """Loss of each image in nats [N]: -log p(x | z), plus the annealed and balanced KL term.

        Args:
            images: as for `image_values`.
            cond: None; NVAE has no condition.
            rnd: source of random numbers, `rnd.randn_like(x)`; torch's if None.
            nimg: images seen before the step.
            noise: draws of the posteriors, instead of `rnd`'s.
        """
        assert cond is None, "NVAE has no condition"
        randn_like = torch.randn_like if rnd is None else rnd.randn_like
        x = image_values(net.decoder, images, net.loss_crop, randn_like)
        out = net(x, randn_like if noise is None else noise)
        recon = reconstruction_loss(net, out.logits, x)
        kl, coeffs = balanced_kl(out.kl_all, self.alpha, self.beta(nimg))
        self._report.update(
            beta=self.beta(nimg),
            recon=recon.detach().mean(),
            kl=out.kl_all.detach().sum(dim=1).mean(),
            kl_groups=out.kl_all.detach().mean(dim=0),
            kl_coeffs=coeffs,
            active_units=(out.kl_diag.detach() > ACTIVE_KL).sum(),
        )
        return recon + kl

    def regularizer(self, net: Any, nimg: int) -> torch.Tensor | None:
        """lambda (sum of the weights' spectral norms + sum of max |gamma| of batch norms) [], or None if lambda is 0.

        Call it once per step.
        """
        weight = self.regularizer_weight(nimg)
        if weight == 0:
            return None
        spectral = self.spectral_norms(net.weight_stacks())
        scales = net.batch_norm_scales()
        batch_norm = max_abs_scales(scales) if scales else torch.zeros_like(spectral)
        self._report.update({"lambda": weight, "spectral_norms": spectral.detach(), "bn_scales": batch_norm.detach()})
        return weight * (spectral + batch_norm)

    def report(self) -> dict[str, Any]:
        """Figures of the latest step, tensors where they come from the device.

        beta, lambda; recon and kl, nats per image; kl_groups and kl_coeffs [G], the top group first; active_units, the
        number of latent channels with more than 0.1 nats of KL; spectral_norms and bn_scales, the sums that lambda
        multiplies.
        """
        return dict(self._report)

    def of_each_image(self) -> dict[str, torch.Tensor]:
        """Nothing: there are no noise levels."""
        return {}


class PixelObjective(VAEObjective):
    """The same as the training loop asks for it: of images in [-1, 1], as `StandardRGBEncoder` gives them."""

    def forward(
        self, net: Any, images: torch.Tensor, cond: Any = None, *, rnd: Any = None, nimg: int, noise: Any = None
    ) -> torch.Tensor:
        """Loss of each image in nats [N].

        Args:
            images: float32 [N, C, H, W] without the border of the network.
            cond: not used; NVAE has no condition.
            rnd, nimg, noise: as for `VAEObjective`.
        """
        if noise is None and rnd is not None:  # one draw for each image, instead of one for each of its groups
            noise = net.split_noise(rnd.randn([len(images), net.noise_size]))
        return super().forward(net, to_bytes(images), rnd=rnd, nimg=nimg, noise=noise)

    def report(self) -> dict[str, Any]:
        """Figures of the latest step by name, numbers or tensors [].

        Beside those of `VAEObjective`: loss in bits per dimension (`bpd`), and KL of each group (`kl_00`: the top one).
        """
        report = super().report()
        if not report:
            return report
        groups, _ = report.pop("kl_groups"), report.pop("kl_coeffs")
        report["bpd"] = (report["recon"] + report["kl"]) / self.nats_per_bpd
        return report | {f"kl_{i:02d}": kl for i, kl in enumerate(groups)}


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """The uint8 pixels of images in [-1, 1]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
