"""Images edited by a denoiser: filled in, coloured, restored, encoded as noise, and blended.

What is known of an image is put back after each update of a sampler (`control`), so this works with every solver.
Encoding follows the probability flow from an image to noise (Song et al. 2021, arXiv 2011.13456, Section 4.3), and
decoding follows it back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dnnlib.errors import UserError
from training.conditioning import DataSpec
from training.control import Control, KnownGrey, KnownPixels
from training.dataset.images import ImageFolderDataset
from training.denoiser import Denoiser, schedule_of, without_steps
from training.encoders import StandardRGBEncoder
from training.generation import LoadedGenerator
from training.generators import DiffusionGenerator
from training.guides import check_denoiser
from training.samplers import StackedRandomGenerator
from training.samplers.adaptive import encode_by_flow

Cond = torch.Tensor | None


@dataclass(frozen=True)
class Images:
    """Images to be edited.

    Args:
        indices: in their dataset.
        pixels: uint8 [N, C, H, W].
        cond: their classes as the network takes them, [N, ...]; None = it takes none, or they are not known.
    """

    indices: list[int]
    pixels: torch.Tensor
    cond: Cond


class Editor:
    """A denoiser of pixels, and what it does with images.

    Args:
        loaded: the network, and how it is sampled.
        batch: images at a time.

    Raises:
        UserError: the network works on latents, or is no denoiser, nor a consistency model sampled as one.
    """

    def __init__(self, loaded: LoadedGenerator, batch: int = 32):
        self.loaded, self.batch, self.device = loaded, batch, loaded.device
        self.net: Any = loaded.snapshot.net
        name = loaded.config.networks.net
        assert name is not None
        if not (loaded.snapshot.is_consistency_model and loaded.config.sampling.sampler.solver == "consistency"):
            check_denoiser(loaded.snapshot, name)
        if not isinstance(loaded.snapshot.encoder, StandardRGBEncoder):
            raise UserError(f"--net={name}: works on latents; images are edited by networks that work on pixels")
        self.encoder = loaded.snapshot.encoder
        generator = loaded.generator(batch)
        assert isinstance(generator, DiffusionGenerator)
        self.generator = generator

    def images_of(self, data: str, indices: Sequence[int], factor: int = 1) -> Images:
        """Images of a dataset, with their classes where it has those that the network knows.

        Args:
            factor: by which they are smaller than those that the network makes.

        Raises:
            UserError: they are not such as the network was trained on, or an index is too large.
        """
        spec = self.net.spec
        dataset = ImageFolderDataset(data, use_labels=spec.conditioning.num_classes > 0)
        grey = spec.channels == 3 and dataset.num_channels == 1
        check_images(dataset, data, indices, spec, channels=1 if grey else spec.channels, factor=factor)
        images, labels = zip(*(dataset[i] for i in indices), strict=True)
        pixels = torch.from_numpy(np.stack(images)).to(self.device)
        known = dataset.label_dim > 0 and dataset.label_dim == spec.conditioning.num_classes
        cond = torch.from_numpy(np.stack(labels)).float().to(self.device) if known else None
        return Images(list(indices), pixels.expand(-1, spec.channels, -1, -1), cond)

    def describe(self, cond: Cond) -> dict[str, Any]:
        """What edits images, as plain JSON values.

        Args:
            cond: the classes of the images, where they are known.
        """
        facts = self.loaded.describe([])
        del facts["seeds"]
        if cond is not None:
            facts.pop("class_policy", None)
            facts["labels"] = "those of the images"
        return facts

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in the units of the denoiser, float32 [N, C, H, W]."""
        return self.encoder.encode_latents(pixels)

    def sample(self, control: Control, cond: Cond, seeds: Sequence[int]) -> torch.Tensor:
        """Pixels that agree with what a control puts back, uint8 [N, C, H, W], one image per seed.

        Args:
            cond: classes; None = as `generate_images.py` would choose them.
        """
        rnd = StackedRandomGenerator(self.device, seeds)
        noise, drawn = self.generator.noise(rnd), self.generator.condition(rnd)
        with torch.no_grad():
            x = self.generator(noise, drawn if cond is None else cond, rnd, control)
            return self.encoder.decode(control(x, 0.0, rnd.randn_like))

    def inpaint(self, images: Images, mask: torch.Tensor, fills: int, seed: int) -> torch.Tensor:
        """Images with their unknown pixels filled in, uint8 [N, fills, C, H, W].

        Args:
            mask: 1 where a pixel is known, [N or 1, 1, H, W].
            fills: of each image.
            seed: of the first fill of the first image of the dataset; each fill has its own.
        """
        latents = self.latents(images.pixels)
        masks = mask.to(self.device).expand(len(latents), -1, -1, -1)
        return self._fill(
            images, fills, seed, lambda part, *of: self.sample(KnownPixels(latents[part], masks[part]), *of)
        )

    def colorize(self, images: Images, fills: int, seed: int) -> torch.Tensor:
        """Images with the brightness of the given ones and colours of the network, uint8 [N, fills, C, H, W].

        Raises:
            UserError: the network makes no colours.
        """
        if self.net.spec.channels != 3:
            raise UserError(f"colouring needs a network of 3 channels, and this one has {self.net.spec.channels}")
        latents = self.latents(images.pixels)
        return self._fill(images, fills, seed, lambda part, *of: self.sample(KnownGrey(latents[part]), *of))

    def restore(
        self, images: Images, wrap: Callable[[torch.Tensor], Callable[[Denoiser], Denoiser]], fills: int, seed: int
    ) -> torch.Tensor:
        """Images by a denoiser that knows something of the given ones, uint8 [N, fills, C, H, W].

        Args:
            wrap: makes, for images that are named by their positions, what makes that denoiser of the network's.
            fills, seed: as for `inpaint`.
        """
        generator = self.loaded.generator(None)  # which can be differentiated
        assert isinstance(generator, DiffusionGenerator)

        def sample(part: torch.Tensor, cond: Cond, seeds: Sequence[int]) -> torch.Tensor:
            rnd = StackedRandomGenerator(self.device, seeds)
            noise, drawn = generator.noise(rnd), generator.condition(rnd)
            with torch.no_grad():
                x = generator(noise, drawn if cond is None else cond, rnd, wrap=wrap(part))
                return self.encoder.decode(x)

        return self._fill(images, fills, seed, sample)

    def _fill(
        self,
        images: Images,
        fills: int,
        seed: int,
        sample: Callable[[torch.Tensor, Cond, Sequence[int]], torch.Tensor],
    ) -> torch.Tensor:
        """Samples for each image, by a function of positions of images, their classes, and a seed for each."""
        rows = [i for i in range(len(images.indices)) for _ in range(fills)]
        seeds = [seed + images.indices[i] * fills + k % fills for k, i in enumerate(rows)]
        parts = []
        for start in range(0, len(rows), self.batch):
            chosen = torch.tensor(rows[start : start + self.batch], device=self.device)
            cond = None if images.cond is None else images.cond[chosen]
            parts.append(sample(chosen, cond, seeds[start : start + self.batch]))
        filled = torch.cat(parts)
        return filled.reshape(len(images.indices), fills, *filled.shape[1:])

    @torch.no_grad()
    def encode(self, images: Images) -> torch.Tensor:
        """The noise that the flow carries images to, of unit variance for typical images, float32 [N, C, H, W]."""
        schedule, options = without_steps(schedule_of(self.net)), self.loaded.config.sampling.sampler.rk45
        latents, cond = self.latents(images.pixels), images.cond
        parts = [
            encode_by_flow(self._denoiser(None if cond is None else cond[i : i + self.batch]), x, schedule, options)
            for i, x in zip(range(0, len(latents), self.batch), latents.split(self.batch), strict=True)
        ]
        return torch.cat(parts)

    def _denoiser(self, cond: Cond) -> Any:
        return lambda x, sigma: self.net(x.float(), sigma, cond)

    @torch.no_grad()
    def decode(self, noise: torch.Tensor, cond: Cond, seeds: Sequence[int]) -> torch.Tensor:
        """Images of noise, uint8 [N, C, H, W], by the chosen sampler; seeds are those of what it draws."""
        parts = []
        for i in range(0, len(noise), self.batch):
            rnd = StackedRandomGenerator(self.device, seeds[i : i + self.batch])
            part = None if cond is None else cond[i : i + self.batch]
            parts.append(self.encoder.decode(self.generator(noise[i : i + self.batch], part, rnd)))
        return torch.cat(parts)

    def ends_of_seeds(self, seeds: Sequence[int]) -> tuple[torch.Tensor, Cond]:
        """Noise and classes that `generate_images.py` makes images of, one per seed."""
        rnd = StackedRandomGenerator(self.device, seeds)
        noise = self.generator.noise(rnd)
        return noise, self.generator.condition(rnd)

    def interpolate(self, noise: torch.Tensor, cond: Cond, frames: int) -> torch.Tensor:
        """Pictures on great circles from each noise to the next, uint8 [N - 1, frames, C, H, W].

        A picture has the class of the nearer end.
        """
        rows, classes = [], []
        for i in range(len(noise) - 1):
            for k in range(frames):
                t = k / (frames - 1)
                rows.append(between(noise[i : i + 1], noise[i + 1 : i + 2], t))
                classes.append(i if t < 0.5 else i + 1)
        pictures = self.decode(torch.cat(rows), None if cond is None else cond[classes], range(len(rows)))
        return pictures.reshape(len(noise) - 1, frames, *pictures.shape[1:])


def check_images(
    dataset: ImageFolderDataset, data: str, indices: Sequence[int], spec: DataSpec, channels: int, factor: int = 1
) -> None:
    """Check that a dataset holds images for a network of a spec, with so many channels, and smaller by a factor.

    Raises:
        UserError: they are not such as the network was trained on, or an index is too large; `data` names them.
    """
    wanted = (channels, spec.resolution // factor)
    smaller = f" and is to make images of {wanted[1]}x{wanted[1]} larger" if factor > 1 else ""
    if dataset.dtype != np.uint8 or (dataset.num_channels, dataset.resolution) != wanted:
        raise UserError(
            f"--data={data}: images of {dataset.resolution}x{dataset.resolution} with {dataset.num_channels} "
            f"channels, but the network knows {spec.resolution}x{spec.resolution} with {spec.channels}{smaller}: "
            f"convert them as its training data were"
        )
    if max(indices) >= len(dataset):
        raise UserError(f"--indices: {max(indices)} is too large, {data} has {len(dataset)} images")


def between(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """From a (t = 0) to b (t = 1) with an even angle, which keeps the length of normal draws: [N, ...] like `a`."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    cosine = (x * y).sum(dim=1, keepdim=True) / (x.norm(dim=1, keepdim=True) * y.norm(dim=1, keepdim=True) + 1e-12)
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    straight = sine.abs() < 1e-6
    left = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    right = torch.where(straight, t, (t * angle).sin() / sine)
    return (left * x + right * y).reshape(a.shape).float()
