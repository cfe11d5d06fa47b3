"""Seeds -> images, shared out over processes."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from dnnlib.util import EasyDict
from torch_utils import distributed, pictures
from training.denoiser import Denoiser
from training.encoders import Encoder, StandardRGBEncoder
from training.networks.edm2 import Precond
from training.networks.edm2_cpu import for_sampling
from training.samplers.edm import edm_sampler
from training.samplers.noise import StackedRandomGenerator
from training.snapshot import Snapshot, load_network


def image_path(outdir: str | os.PathLike, seed: int, subdirs: bool = False, suffix: str = ".png") -> Path:
    """File of a seed: {seed:06d}.png, with `subdirs` in a folder per thousand."""
    folder = Path(outdir) / f"{seed // 1000 * 1000:06d}" if subdirs else Path(outdir)
    return folder / f"{seed:06d}{suffix}"


def load_image_network(path_or_url: str | Path, device: torch.device | str = "cpu") -> Snapshot:
    """As `load_network`, for a network that makes images.

    Raises:
        UserError: also if it is another network.
    """
    snapshot = load_network(path_or_url, device)
    if not isinstance(snapshot.net, Precond):
        raise UserError(f"{path_or_url}: holds a {type(snapshot.net).__name__}, which makes no images")
    return snapshot


def check_guide(net: Precond, gnet: Precond) -> None:
    """
    Raises:
        UserError: the guiding network cannot guide `net`.
    """
    for name, what in [("img_resolution", "resolution"), ("img_channels", "number of channels")]:
        if getattr(net, name) != getattr(gnet, name):
            raise UserError(
                f"--gnet has {what} {getattr(gnet, name)}, but --net has {getattr(net, name)}: they must agree"
            )
    if gnet.label_dim not in (0, net.label_dim):
        raise UserError(
            f"--gnet has {gnet.label_dim} classes, but --net has {net.label_dim}: "
            f"they must agree, or the guide have none"
        )


def image_resolution(net: Precond, encoder: Encoder, device: torch.device | str) -> int:
    """Height and width of the images that a network makes by way of `encoder`."""
    latents = torch.zeros([1, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    with torch.inference_mode():
        return encoder.decode(latents).shape[-1]


class ImageBatches:
    """This process's share of the batches that `generate_images` makes, generated as they are asked for."""

    def __init__(
        self,
        batches: list[np.ndarray],
        seeds: Sequence[int],
        prepare: Callable[[], Callable[[EasyDict], None]],
        verbose: bool,
    ):
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        self.num_batches, self.num_images = len(batches), len(seeds)
        self.own = [(idx, indices) for idx, indices in enumerate(batches) if idx % world_size == rank]
        self.seeds = seeds
        self.prepare = prepare
        self.verbose = verbose

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[EasyDict]:
        disable = True if not self.verbose or distributed.get_rank() != 0 else None  # None: only on a terminal
        make = self.prepare()
        for batch_idx, indices in tqdm(self.own, unit="batch", disable=disable, dynamic_ncols=True):
            r = EasyDict(images=None, labels=None, noise=None, batch_idx=batch_idx, num_batches=self.num_batches)
            r.indices = indices
            r.seeds = [self.seeds[i] for i in indices]
            make(r)
            yield r


def generate_images(
    net: Precond,
    gnet: Precond | None = None,
    encoder: Encoder | None = None,
    outdir: str | os.PathLike | None = None,
    subdirs: bool = False,
    seeds: Sequence[int] = range(16, 24),
    class_idx: int | None = None,
    max_batch_size: int = 32,
    encoder_batch_size: int = 32,
    verbose: bool = True,
    device: torch.device | str = "cpu",
    compiled: bool = False,
    sampler_fn: Callable[..., torch.Tensor] = edm_sampler,
    **sampler_kwargs: Any,
) -> ImageBatches:
    """Generate one image per seed. An image depends on its seed alone, not on batches or processes.

    Args:
        net, gnet: main and guiding network; `gnet` is used where `sampler_kwargs` ask for guidance.
        encoder: decodes what the sampler returns; default: 8-bit pixels.
        outdir: where images are saved as {seed:06d}.png; None = nowhere.
        subdirs: save in a folder per thousand seeds.
        seeds: one integer per image, over all processes.
        class_idx: class of all images; None = drawn from the seed.
        max_batch_size, encoder_batch_size: images sampled, and decoded, at a time.
        verbose: show a progress bar on terminals.
        device: where to compute; the networks are moved there.
        compiled: as for `fast_inference.for_sampling`.
        sampler_fn, sampler_kwargs: the sampler and its arguments. It gets the networks as `fast_inference.for_sampling`
            makes them, with the weights that they have when the iteration starts.

    Returns:
        An iterable over this process's batches, with a length. Each is an `EasyDict` of images (uint8
        [N, C, H, W], or float32 where the encoder knows no pixels), labels ([N, label_dim] or None), noise,
        seeds, indices (into `seeds`), batch_idx and num_batches. Nothing is generated until it is iterated.

    Raises:
        UserError: `class_idx` is out of range, or `gnet` does not fit `net`.
    """
    if class_idx is not None and not 0 <= class_idx < net.label_dim:
        known = f"the classes are 0 to {net.label_dim - 1}" if net.label_dim else "the network knows no classes"
        raise UserError(f"--class={class_idx} is out of range: {known}")
    if gnet is not None:
        check_guide(net, gnet)
        gnet.to(device).eval()
    net.to(device).eval()
    encoder = encoder if encoder is not None else StandardRGBEncoder()

    # As few batches as possible, of nearly equal size, and a whole number of them per process.
    world_size = distributed.get_world_size()
    count = -(-len(seeds) // (max_batch_size * world_size)) * world_size
    batches = [part for part in np.array_split(np.arange(len(seeds)), max(count, 1)) if len(part) > 0]

    def prepare() -> Callable[[EasyDict], None]:
        largest = max((len(batch) for batch in batches), default=1)
        guide = gnet
        if gnet is not None and sampler_kwargs.get("guidance", 1) != 1:
            guide = for_sampling(gnet, largest, compiled)
        return partial(make, for_sampling(net, largest, compiled), guide)

    def make(main: Denoiser, guide: Denoiser | None, r: EasyDict) -> None:
        rnd = StackedRandomGenerator(device, r.seeds)
        r.noise = rnd.randn([len(r.seeds), net.img_channels, net.img_resolution, net.img_resolution])
        if net.label_dim > 0:
            # Drawn even when the class is given, so that later draws do not depend on that.
            classes = rnd.randint(net.label_dim, [len(r.seeds)])
            if class_idx is not None:
                classes = torch.full_like(classes, class_idx)
            r.labels = torch.nn.functional.one_hot(classes, net.label_dim).float()
        with torch.inference_mode():
            latents = sampler_fn(
                net=main, noise=r.noise, labels=r.labels, gnet=guide, randn_like=rnd.randn_like, **sampler_kwargs
            )
            r.images = torch.cat([encoder.decode(part) for part in latents.split(encoder_batch_size)])
        if outdir is not None:
            for seed, image in zip(r.seeds, r.images.cpu().numpy(), strict=True):
                _save(image_path(outdir, seed, subdirs, encoder.output_suffix(net.img_channels)), image)

    return ImageBatches(batches, seeds, prepare, verbose)


def _save(path: Path, image: np.ndarray) -> None:
    if path.suffix == ".png":
        pictures.save_image(path, image)
        return
    with atomic_write(path, sync=False) as f:
        np.save(f, image)
