"""Whole datasets through a VAE: pixels to latents and back."""

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import UserError
from dnnlib.progress import Progress
from torch_utils import distributed
from training.conversion.writer import DatasetWriter, encode_png, image_name
from training.dataset.images import ImageFolderDataset
from training.encoders import Moments, NVAEEncoder, VAEEncoder
from training.samplers.noise import StackedRandomGenerator

DISTRIBUTION_PATTERN, LATENT_PATTERN = "img-mean-std-{}.npy", "img-latent-{}.npy"


def encode_images(
    dataset: ImageFolderDataset,
    dest: Path,
    encoder: VAEEncoder,
    device: torch.device,
    dtype: torch.dtype,
    max_images: int | None = None,
    batch: int = 8,
    resume: bool = False,
    draws: int = 1,
) -> int:
    """Encode pixels as latents of a VAE, float32 [C, H, W]: mean and standard deviation of each channel, where the VAE
    gives them.

    Those of an NVAE are draws, which depend on the index of the item alone. The encoder is recorded in dataset.json,
    with the statistics of these latents if it needs them and has none. Under torchrun the processes share the work, and
    the first one writes. Returns the number of items.

    Args:
        dtype: what the VAE computes in.
        draws: items for each image, one after the other, where latents are draws.

    Raises:
        UserError: the images are not such as the VAE knows, it gives NaN or infinity, `dest` exists, or `draws` has no
            meaning for it.
        OSError: `dest` cannot be written.
    """
    if dataset.dtype != np.uint8:
        raise UserError(f"{dataset.path}: holds {dataset.num_channels} channels of {dataset.dtype}, not images")
    encoder.check_images(str(dataset.path), dataset.num_channels, dataset.resolution)
    if draws > 1 and not isinstance(encoder, NVAEEncoder):
        raise UserError(f"--draws={draws}: only latents of an NVAE are stored as draws: leave it out")
    encoder = encoder.identified()
    moments = None if encoder.is_measured else Moments(encoder.distribution)

    def record() -> dict[str, Any]:
        return (encoder if moments is None else encoder.measured(*moments.result())).record

    def encode(images: torch.Tensor, names: Sequence[str], items: Sequence[int]) -> torch.Tensor:
        randn_like = StackedRandomGenerator(device, items).randn_like
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            latents = encoder.encode_pixels(images.to(device), randn_like).float()
        _check_finite(latents, names, dtype)
        return latents

    work = _Work(
        function=encode,
        name_of=lambda index: image_name(index, DISTRIBUTION_PATTERN if encoder.distribution else LATENT_PATTERN),
        file_of=_npy,
        facts=dict(kind="encode", options=[encoder.init_kwargs, str(dtype)]),
        moments=moments,
        record=record,
        repeat=draws,
    )
    return _map_dataset(dataset, dest, work, max_images, batch, resume)


def decode_latents(
    dataset: ImageFolderDataset,
    dest: Path,
    encoder: VAEEncoder,
    device: torch.device,
    dtype: torch.dtype,
    max_images: int | None = None,
    batch: int = 8,
    resume: bool = False,
) -> int:
    """Decode latents of a VAE into images; of mean and standard deviation the mean.

    Arguments, result and errors as `encode_images`.
    """
    if dataset.dtype != np.float32:
        raise UserError(f"{dataset.path}: holds {dataset.num_channels} channels of {dataset.dtype}, not VAE latents")
    channels = encoder.latent_channels()
    if not (encoder.distribution and dataset.num_channels == 2 * channels):
        encoder.check_channels(dataset.num_channels)

    def decode(latents: torch.Tensor, names: Sequence[str], _items: Sequence[int]) -> torch.Tensor:
        raw = latents[:, :channels].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pixels = encoder.raw_to_floats(raw)
        _check_finite(pixels, names, dtype)
        return encoder.floats_to_pixels(pixels)

    work = _Work(
        function=decode,
        name_of=image_name,
        file_of=lambda image: encode_png(image.transpose(1, 2, 0)),
        facts=dict(kind="decode", options=[encoder.init_kwargs, str(dtype)]),
    )
    return _map_dataset(dataset, dest, work, max_images, batch, resume)


def _check_finite(values: torch.Tensor, names: Sequence[str], dtype: torch.dtype) -> None:
    """Refuse results that hold NaN or infinity.

    Raises:
        UserError: one does; names the image.
    """
    good = values.isfinite().flatten(1).all(dim=1).tolist()
    if not all(good):
        remedy = (
            "give --precision=fp32 or bf16" if dtype == torch.float16 else "is --encoder the right VAE, and complete?"
        )
        raise UserError(f"{names[good.index(False)]}: the VAE turns it into NaN or infinity: {remedy}")


@dataclass(frozen=True)
class _Work:
    """What is done to a dataset.

    `function` maps a batch of images (their names, for messages, and the indices of the results) to results,
    `file_of` a result to the contents of its file, `name_of` its index to the name of that; `facts` must be the same
    when the work is resumed. `moments` are to be gathered of all results, and `record` gives what dataset.json says
    of the encoder when all are done. Each image has `repeat` results, one after the other.
    """

    function: Callable[[torch.Tensor, Sequence[str], Sequence[int]], torch.Tensor]
    name_of: Callable[[int], str]
    file_of: Callable[[np.ndarray], bytes]
    facts: dict[str, Any]
    moments: Moments | None = None
    record: Callable[[], dict[str, Any]] | None = None
    repeat: int = 1


def _map_dataset(
    dataset: ImageFolderDataset, dest: Path, work: _Work, max_images: int | None, batch: int, resume: bool
) -> int:
    """Write the results for all images, in order, with their labels; the number of results."""
    count = work.repeat * (len(dataset) if max_images is None else min(max_images, len(dataset)))
    writer: DatasetWriter | None = None  # in the first process
    with distributed.fail_together():
        if distributed.get_rank() == 0:
            writer = DatasetWriter(dest, dict(source=dataset.info().content_hash, count=count, **work.facts), resume)
    try:
        _write_results(dataset, writer, work, count, batch)
        with distributed.fail_together():
            if writer is not None:
                images = [i // work.repeat for i in range(count)]
                labels = [dataset.get_stored_label(i) for i in images] if dataset.has_labels else None
                pairs = None if labels is None else [[work.name_of(i), label] for i, label in enumerate(labels)]
                contents: dict[str, Any] = {"labels": pairs}
                if dataset.class_names is not None:
                    contents["classes"] = dataset.class_names
                if work.record is not None:
                    contents["encoder"] = work.record()
                writer.write("dataset.json", json.dumps(contents).encode())
                writer.finish()
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    return count


def _write_results(
    dataset: ImageFolderDataset, writer: DatasetWriter | None, work: _Work, count: int, batch: int
) -> None:
    """Rounds in which each process takes one batch; the last of them may be short or empty."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    done = 0
    if writer is not None:
        done = next(i for i in range(count + 1) if i == count or work.name_of(i) not in writer.names)
        if work.moments is not None:
            for i, (_name, data) in enumerate(writer.contents()):
                if i < done:
                    work.moments.add(np.load(io.BytesIO(data)))
    done = distributed.from_first(done)
    starts = range(done, count, batch * world_size)
    with Progress(total=count, initial=done, unit="img", hidden=rank != 0) as progress:
        for start in starts:
            begin = min(start + rank * batch, count)
            indices = range(begin, min(begin + batch, count))
            part = torch.zeros(0)
            with distributed.fail_together():
                if len(indices) > 0:
                    sources = [i // work.repeat for i in indices]
                    images = torch.from_numpy(np.stack([dataset[i][0] for i in sources]))
                    names = [f"{dataset.path}: {dataset.name(i)}" for i in sources]
                    part = work.function(images, names, indices).cpu()
            parts = [part.numpy() for part in distributed.gather_to_first(part)]
            with distributed.fail_together():
                for image in itertools.chain.from_iterable(parts):
                    assert writer is not None
                    if work.moments is not None:
                        work.moments.add(image.astype(np.float32))
                    writer.write(work.name_of(done), work.file_of(image))
                    done += 1
                    progress.update()


def _npy(array: np.ndarray) -> bytes:
    f = io.BytesIO()
    np.save(f, array.astype(np.float32))
    return f.getvalue()
