"""The network of NVAE: a variational autoencoder with a hierarchy of latent groups.

Vahdat & Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder" (arXiv 2007.03898). The encoder runs bottom-up,
the decoder top-down; posteriors combine both at each group. Names of parameters are those of the published checkpoints,
and so are the names of the options.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from training.conditioning import DataSpec
from training.config.nvae import NVAENetwork
from training.networks.nvae_cells import ARCHITECTURES, UP, Cell
from training.networks.nvae_distributions import (
    BernoulliDecoder,
    Decoder,
    LogisticMixtureDecoder,
    Normal,
    NormalDecoder,
    RandnLike,
)
from training.networks.nvae_flows import FlowCell
from training.networks.nvae_layers import (
    BatchNorm2d,
    Conv2d,
    DecoderCombiner,
    EncoderCombiner,
    batch_norms,
    convolutions,
    stacked_weights,
)
from training.preconditioning import compute_dtype

# Normal draws, one per group in the order of the decoder (the top one first): the draws, or a function that makes one
# of the shape of its argument.
Noise = Sequence[torch.Tensor] | RandnLike | None


class Output(NamedTuple):
    """What one pass over N images gives. All in float32; logs are natural.

    Attributes:
        logits: [N, `net.decoder.logit_channels`, R, R]; `net.decoder` makes images of them.
        log_q: log-density of the latents under the posterior [N], summed over groups.
        log_p: log-density of the latents under the prior [N].
        kl_all: KL divergence per image and group [N, G], the top group first. Without flows it is computed from the
            two normals, with flows it is log q - log p of the latents drawn, which can be negative.
        kl_diag: KL divergence per group and latent channel [G, Z], mean over the batch.
    """

    logits: torch.Tensor
    log_q: torch.Tensor
    log_p: torch.Tensor
    kl_all: torch.Tensor
    kl_diag: torch.Tensor


class Features(NamedTuple):
    """What the encoder finds in N images: for the top group, and for each further group in the decoder's order."""

    top: torch.Tensor
    groups: list[torch.Tensor]


class NVAE(nn.Module):
    """NVAE: images [N, C, R, R] in [0, 1] -> `Output`.

    Args:
        img_resolution: R, with the border that `loss_crop` names; a multiple of 2^(halvings of the options).
        img_channels: C.
        precision: 'fp32', 'bf16' or 'fp16': what convolutions compute in. Weights, distributions and outputs are
            float32.
        options: those of `NVAENetwork`.

    Raises:
        UserError: options that do not fit each other, or the images.
    """

    def __init__(self, img_resolution: int, img_channels: int, precision: str = "fp32", **options: Any):
        super().__init__()
        o = NVAENetwork(**options)
        o.check_images(img_resolution - 2 * o.loss_crop, img_channels)
        self.init_kwargs = o.to_json()
        self.precision = precision
        self.shared_stacks: dict[tuple[int, int], torch.Tensor] | None = None  # set inside `effective_weights`
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.loss_crop, self.res_dist = o.loss_crop, o.res_dist
        self.groups_per_scale = groups = o.groups
        self.decoder = _make_decoder(o, img_channels)
        plain = groups == [1]
        top_size = img_resolution >> o.halvings
        scale_of_group = [i for i, count in enumerate(reversed(groups)) for _ in range(count)]  # 0: lowest resolution
        Z, use_se = o.num_latent_per_group, o.use_se
        self.latent_shapes = [(Z, top_size << i, top_size << i) for i in scale_of_group]
        ops = ARCHITECTURES[o.arch_instance]
        enc, dec = o.num_channels_enc << o.halvings, o.num_channels_dec << o.halvings  # channels of the top group

        # In the order of the published network, on which the order of its optimiser's state depends.
        self.prior_ftr0 = nn.Parameter(torch.rand(dec, top_size, top_size))
        self.stem = Conv2d(img_channels, o.num_channels_enc, 3)
        pre = _pre_process(o.num_preprocess_blocks, o.num_preprocess_cells, o.num_channels_enc, ops.pre, use_se)
        self.pre_process = nn.ModuleList(pre)
        tower = [] if plain else _encoder_tower(groups, enc, dec, o.num_cell_per_cond_enc, ops.encoder, use_se)
        self.enc_tower = nn.ModuleList(tower)
        self.enc0 = nn.Sequential(nn.ELU(), Conv2d(enc, enc, 1), nn.ELU())
        self.enc_sampler = nn.ModuleList(Conv2d(enc >> i, 2 * Z, 3) for i in scale_of_group)
        self.dec_sampler = nn.ModuleList(
            nn.Sequential(nn.ELU(), Conv2d(dec >> i, 2 * Z, 1)) for i in scale_of_group[1:]
        )
        self.nf_cells = nn.ModuleList(FlowCell(Z) for _ in range(o.num_nf * len(scale_of_group)))
        if plain:
            self.stem_decoder = Conv2d(Z, dec, 1)
        tower = [] if plain else _decoder_tower(groups, dec, Z, o.num_cell_per_cond_dec, ops.decoder, use_se)
        self.dec_tower = nn.ModuleList(tower)
        post = _post_process(o.num_postprocess_blocks, o.num_postprocess_cells, o.num_channels_dec, ops.post, use_se)
        self.post_process = nn.ModuleList(post)
        self.image_conditional = nn.Sequential(nn.ELU(), Conv2d(o.num_channels_dec, self.decoder.logit_channels, 3))

    @property
    def spec(self) -> DataSpec:
        """What its images look like without their border."""
        return DataSpec(channels=self.img_channels, resolution=self.img_resolution - 2 * self.loss_crop)

    @property
    def num_groups(self) -> int:
        """G, latent groups of all scales together."""
        return len(self.latent_shapes)

    @property
    def dims(self) -> int:
        """Values of an image that the likelihood counts."""
        return self.img_channels * (self.img_resolution - 2 * self.loss_crop) ** 2

    def encode(self, x: torch.Tensor) -> Features:
        """Features of images [N, C, R, R] in [0, 1]."""
        groups = []
        with self._autocast():
            h = self.stem(_channels_last(2 * x - 1))
            for cell in self.pre_process:
                h = cell(h)
            for module in self.enc_tower:
                if isinstance(module, EncoderCombiner):
                    groups.append(h)
                else:
                    h = module(h)
            return Features(self.enc0(h), groups[::-1])

    def forward(self, x: torch.Tensor, noise: Noise = None) -> Output:
        """
        Args:
            x: images [N, C, R, R] with values in [0, 1], quantised to the levels of `net.decoder`.
            noise: draws of the posteriors.
        """
        return self.decode(self.encode(x), noise)

    def decode(self, features: Features, noise: Noise = None, repeat: int = 1) -> Output:
        """The rest of `forward`, with `repeat` independent draws for each of the N images.

        The outputs are those of N repeat images, those of one image together.
        """
        draws = self._draws(noise, features.top.shape[0] * repeat)
        log_q, log_p, kl = [], [], []

        def latent(i: int, x: torch.Tensor) -> torch.Tensor:
            parameters = self._prior(i, x)
            prior, posterior = Normal.split(parameters), self._posterior(i, x, parameters, features, repeat)
            before = posterior.sample(next(draws))
            z = self._flow(i, before)
            log_q.append(posterior.log_prob(before))
            log_p.append(prior.log_prob(z))
            kl.append(log_q[-1] - log_p[-1] if len(self.nf_cells) else posterior.kl(prior))
            return z

        logits = self._top_down(latent, features.top.shape[0] * repeat)
        per_channel = [k.sum(dim=(2, 3)) for k in kl]
        return Output(
            logits,
            torch.stack([q.sum(dim=(1, 2, 3)) for q in log_q]).sum(dim=0),
            torch.stack([p.sum(dim=(1, 2, 3)) for p in log_p]).sum(dim=0),
            torch.stack([k.sum(dim=1) for k in per_channel], dim=1),
            torch.stack([k.mean(dim=0) for k in per_channel]),
        )

    def sample(self, n: int, temperature: float = 1, noise: Noise = None) -> torch.Tensor:
        """Logits of n images drawn from the prior, whose standard deviations are multiplied by `temperature`."""
        draws = self._draws(noise, n)
        return self._top_down(lambda i, x: Normal.split(self._prior(i, x), temperature).sample(next(draws)), n)

    def prior_draws(self, x: torch.Tensor, noise: Noise = None) -> list[torch.Tensor]:
        """Latents of images as `sample` would have to draw them: (z - mu_p) / sigma_p of each group, [N, Z, H, W].

        `sample(n, noise=prior_draws(x))` reconstructs the images. `noise` are the draws of the posteriors.
        """
        draws, found = self._draws(noise, x.shape[0]), []
        features = self.encode(x)

        def latent(i: int, x: torch.Tensor) -> torch.Tensor:
            parameters = self._prior(i, x)
            z = self._flow(i, self._posterior(i, x, parameters, features).sample(next(draws)))
            found.append(Normal.split(parameters).standardize(z))
            return z

        self._top_down(latent, x.shape[0])
        return found

    def crop(self, images: torch.Tensor) -> torch.Tensor:
        """Images without the border that `loss_crop` names."""
        c = self.loss_crop
        return images[:, :, c : images.shape[2] - c, c : images.shape[3] - c]

    def weight_stacks(self) -> dict[tuple[int, int], torch.Tensor]:
        """Effective weights of all convolutions as `stacked_weights` gives them."""
        return stacked_weights(convolutions(self)) if self.shared_stacks is None else self.shared_stacks

    def batch_norm_scales(self) -> list[torch.Tensor]:
        """gamma of each batch norm [C]."""
        return [norm.weight for norm in batch_norms(self)]

    def decoder_batch_norms(self) -> list[BatchNorm2d]:
        """Batch norms that a sample from the prior passes."""
        return batch_norms(nn.ModuleList([self.dec_tower, self.post_process]))

    def split_noise(self, draws: torch.Tensor) -> list[torch.Tensor]:
        """The draws of each group [n, Z, H, W] out of those of an image in a row [n, `noise_size`]."""
        parts = draws.split([math.prod(shape) for shape in self.latent_shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.latent_shapes, strict=True)]

    @property
    def noise_size(self) -> int:
        """Latents of an image, of all groups."""
        return sum(math.prod(shape) for shape in self.latent_shapes)

    def _draws(self, noise: Noise, n: int) -> Iterator[torch.Tensor]:
        """Draws of each group [n, Z, H, W]; they do not depend on the memory format of activations."""
        if noise is None or callable(noise):
            source = torch.randn_like if noise is None else noise
            for shape in self.latent_shapes:
                yield source(torch.empty(n, *shape, device=self.prior_ftr0.device))
        else:
            yield from noise

    def _top_down(self, latent: Callable[[int, torch.Tensor], torch.Tensor], n: int) -> torch.Tensor:
        """Logits [n, ...]; `latent(i, x)` makes the latents of group i from the decoder's features there."""
        x, group = _channels_last(self.prior_ftr0.expand(n, -1, -1, -1)), 0
        with self._autocast():
            if not len(self.dec_tower):
                x = self.stem_decoder(latent(0, x))
            for module in self.dec_tower:
                if isinstance(module, DecoderCombiner):
                    x = module(x, latent(group, x))
                    group += 1
                else:
                    x = module(x)
            for cell in self.post_process:
                x = cell(x)
            return self.image_conditional(x).float()

    def _autocast(self) -> AbstractContextManager:
        """Within it, convolutions compute in the network's precision."""
        device = self.prior_ftr0.device
        dtype = compute_dtype(self.precision, device)
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    @property
    def _combiners(self) -> list[nn.Module]:
        """Combiners of the encoder, in its own order: the last one belongs to the decoder's second group."""
        return [m for m in self.enc_tower if isinstance(m, EncoderCombiner)]

    def _prior(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Parameters of the prior of group i [N, 2 Z, H, W]: 0 for the top group."""
        if i > 0:
            return self.dec_sampler[i - 1](x)
        Z, H, W = self.latent_shapes[0]
        return x.new_zeros(x.shape[0], 2 * Z, H, W)

    def _posterior(self, i: int, x: torch.Tensor, prior: torch.Tensor, features: Features, repeat: int = 1) -> Normal:
        """Posterior of group i, given the parameters of its prior."""
        if i > 0:
            mine = features.groups[i - 1].repeat_interleave(repeat, dim=0)
            parameters = self.enc_sampler[i](self._combiners[-i](mine, x))
        else:
            parameters = self.enc_sampler[0](features.top).repeat_interleave(repeat, dim=0)
        return Normal.split(prior + parameters if self.res_dist else parameters)

    def _flow(self, i: int, z: torch.Tensor) -> torch.Tensor:
        per_group = len(self.nf_cells) // self.num_groups
        for cell in self.nf_cells[i * per_group : (i + 1) * per_group]:
            z = cell(z)
        return z


# ---------------------------------------------------------------------------------------------------------
# Parts


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _make_decoder(o: NVAENetwork, channels: int) -> Decoder:
    if o.decoder == "bernoulli":
        return BernoulliDecoder()
    if o.decoder == "mixture":
        return LogisticMixtureDecoder(channels, o.num_mixture_dec, o.levels, o.published_decoder)
    return NormalDecoder(channels, o.levels, o.published_decoder)


def _pre_process(blocks: int, cells: int, width: int, ops: tuple[str, ...], use_se: bool) -> Iterator[nn.Module]:
    """Blocks that halve the size, with the halving in their last cell."""
    for i in range(blocks):
        for _ in range(cells - 1):
            yield Cell(ops, width << i, width << i, 1, use_se)
        yield Cell(ops, width << i, width << (i + 1), 2, use_se)


def _post_process(blocks: int, cells: int, width: int, ops: tuple[str, ...], use_se: bool) -> Iterator[nn.Module]:
    """Blocks that double the size, with the doubling in their first cell."""
    for i in reversed(range(blocks)):
        yield Cell(ops, width << (i + 1), width << i, UP, use_se)
        for _ in range(cells - 1):
            yield Cell(ops, width << i, width << i, 1, use_se)


def _encoder_tower(
    groups: Sequence[int], enc: int, dec: int, cells: int, ops: tuple[str, ...], use_se: bool
) -> Iterator[nn.Module]:
    """From the highest resolution to the lowest, which has `enc` and `dec` channels; the top group has no combiner."""
    for s, count in enumerate(groups):
        up = len(groups) - 1 - s
        for g in range(count):
            for _ in range(cells):
                yield Cell(ops, enc >> up, enc >> up, 1, use_se)
            if up or g < count - 1:
                yield EncoderCombiner(enc >> up, dec >> up)
        if up:
            yield Cell(ops, enc >> up, enc >> (up - 1), 2, use_se)


def _decoder_tower(
    groups: Sequence[int], dec: int, latents: int, cells: int, ops: tuple[str, ...], use_se: bool
) -> Iterator[nn.Module]:
    """From the lowest resolution, which has `dec` channels, to the highest."""
    for i, count in enumerate(reversed(groups)):
        width = dec >> i
        for g in range(count):
            if i or g:
                for _ in range(cells):
                    yield Cell(ops, width, width, 1, use_se)
            yield DecoderCombiner(width, latents)
        if i < len(groups) - 1:
            yield Cell(ops, width, width // 2, UP, use_se)
