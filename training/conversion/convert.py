"""Making datasets: any images in, square PNG files or latents out."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from dnnlib.errors import RunError, UserError, one_line
from torch_utils import distributed
from training.conversion.sources import Label, Source, SourceImage
from training.conversion.transforms import decode_image, make_transform
from training.conversion.writer import DatasetWriter
from training.dataset.images import MAX_LABEL, ImageFolderDataset, evenly_spaced
from training.encoders import StabilityVAEEncoder, to_pixels, whiten

CHUNK = 16  # images that a worker gets at a time
MADE_AGAIN = 64  # images, to see that the source is the same
AHEAD = 4  # chunks per worker that may be under way


def image_name(index: int, pattern: str = "img{}.png") -> str:
    """'00000/img00000000.png' and so on, a thousand per folder."""
    return f"{index // 1000:05d}/" + pattern.format(f"{index:08d}")


@dataclass(frozen=True)
class ImageSettings:
    """What is done to each image."""

    transform: str | None
    width: int | None
    height: int | None
    channels: int


@dataclass
class Converted:
    """What became of an image: a PNG file and its size, or the reason why there is none."""

    index: int
    name: str
    label: Label
    png: bytes | None = None
    size: tuple[int, int] = (0, 0)
    reason: str = ""
    is_error: bool = False


@dataclass
class Report:
    """What a conversion did, as it is kept beside the labels."""

    written: int = 0
    too_small: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, error
    classes: list[str] | None = None  # names of the classes 0, 1, ...
    num_classes: int = 0  # of labels that are classes


def convert_images(
    sources: Sequence[Source],
    dest: Path,
    settings: ImageSettings,
    labels: dict[str, Label] | None = None,
    max_images: int | None = None,
    workers: int = 1,
    on_error: str = "fail",
    resume: bool = False,
) -> Report:
    """Convert images into a dataset of uncompressed PNG files. Its bytes do not depend on the number of workers.

    Args:
        labels: by name of the image (with or without its folders); None = those of the sources.
        on_error: 'fail', or 'skip' images that are broken.

    Raises:
        UserError: no images, broken ones, sizes or labels that do not go together, or `dest` exists.
        OSError: it cannot be written. What is there stays, for `resume`.
    """
    make_transform(settings.transform, settings.width, settings.height)  # fails before anything is written
    options = dict(
        sources=[str(source.path) for source in sources],
        transform=settings.transform,
        resolution=None if settings.width is None else [settings.width, settings.height],
        channels=settings.channels,
        max_images=max_images,
    )
    for source in sources:
        if source.path.is_dir() and dest.resolve().is_relative_to(source.path.resolve()):
            raise UserError(f"--dest={dest}: is inside --source={source.path}: choose another place")
        if labels is None and source.classes != sources[0].classes:
            raise UserError(
                f"--source={source.path}: other names of classes than {sources[0].path}: convert them one by one"
            )
    total = None if any(source.count is None for source in sources) else sum(source.count or 0 for source in sources)
    total = max_images if total is None else min(total, max_images or total)
    writer = DatasetWriter(dest, options, resume)
    try:
        report, listed = _convert(sources, writer, settings, labels, max_images, total, workers, on_error)
        _finish(writer, report, listed, options)
    except BaseException:
        writer.close()
        raise
    return report


def _convert(
    sources: Sequence[Source],
    writer: DatasetWriter,
    settings: ImageSettings,
    labels: dict[str, Label] | None,
    max_images: int | None,
    total: int | None,
    workers: int,
    on_error: str,
) -> tuple[Report, "_Labels"]:
    report, listed = Report(), _Labels(labels)
    first: Converted | None = None
    images = itertools.islice(itertools.chain.from_iterable(source.images() for source in sources), max_images)
    # Closed before an error leaves, so that the workers end in order.
    work = _in_order(_Task(settings), _chunks(images, writer.names), workers)
    with (
        contextlib.closing(work),
        tqdm(total=total, unit="img", disable=None, dynamic_ncols=True) as progress,
    ):
        for result in itertools.chain.from_iterable(work):
            progress.update()
            name = image_name(result.index)
            if result.is_error and name in writer.names:
                raise _changed(result.name, writer)
            if result.png is None and name not in writer.names:
                if not result.is_error:
                    report.too_small += 1
                elif on_error == "fail":
                    raise UserError(f"{result.name}: {result.reason} (--on-error=skip leaves such images out)")
                else:
                    report.skipped.append((result.name, result.reason))
                continue
            if result.png is not None:
                if first is None:
                    first = result
                problem = _size_problem(result, first)
                if problem:
                    writer.discard()  # they have to be made in another way
                    raise UserError(problem)
                if name not in writer.names:
                    writer.write(name, result.png)
                elif zlib.crc32(result.png) != writer.crc(name):
                    raise _changed(result.name, writer)
            listed.add(name, result)
            report.written += 1
    left = set(writer.names).difference(listed.names)
    if left:
        raise _changed("the source, which now has fewer images,", writer)
    if report.written == 0:
        if report.too_small > 0:
            raise UserError(
                f"all {report.too_small} images are too small for --resolution={settings.width}x{settings.height} "
                f"with --transform={settings.transform}: choose a lower one"
            )
        raise UserError(f"no images in {', '.join(str(source.path) for source in sources)} could be converted")
    report.classes = listed.classes() or (sources[0].classes if labels is None else None)
    report.num_classes = listed.num_classes()
    return report, listed


def _changed(what: str, writer: DatasetWriter) -> UserError:
    return UserError(f"--resume: {what} has changed since {writer.partial} was begun: delete that to start anew")


def _size_problem(result: Converted, first: Converted) -> str:
    width, height = result.size
    if result.size != first.size:
        return (
            f"{result.name} is {width}x{height}, but {first.name} {first.size[0]}x{first.size[1]}: "
            "give --resolution (and --transform)"
        )
    return (
        "" if width == height else f"{result.name} is {width}x{height}, not square: give --transform and --resolution"
    )


def _finish(writer: DatasetWriter, report: Report, listed: "_Labels", options: dict[str, Any]) -> None:
    writer.write("dataset.json", listed.to_json())
    facts = dict(written=report.written, too_small=report.too_small, skipped=report.skipped, classes=report.classes)
    writer.write("report.json", json.dumps({**facts, "options": options}, indent=2).encode())
    writer.finish()


class _Labels:
    """Labels of the images written, from the sources or from a file."""

    def __init__(self, given: dict[str, Label] | None):
        self.given = given
        self.by_base: dict[str, Label] = {}  # without folders, where that is one label
        for name, label in (given or {}).items():
            base = name.rsplit("/", 1)[-1]
            self.by_base[base] = label if self.by_base.get(base, label) == label else None
        self.names: list[str] = []
        self.labels: list[Label] = []
        self.missing: list[str] = []

    def add(self, name: str, image: Converted) -> None:
        label = image.label
        if self.given is not None:
            label = self.given.get(image.name, self.by_base.get(image.name.rsplit("/", 1)[-1]))
        if label is None:
            self.missing.append(image.name)
        self.names.append(name)
        self.labels.append(label)

    def classes(self) -> list[str] | None:
        """Names of the classes, where the labels are names.

        Raises:
            UserError: images without a label in the file, or labels of several kinds.
        """
        if self.missing and len(self.missing) < len(self.labels) + (self.given is not None):
            where = "--labels" if self.given is not None else "the source's labels"
            first = ", ".join(self.missing[:3])
            raise UserError(f"{where}: none for {len(self.missing)} images, such as {first}: complete them (--labels)")
        kinds = {type(label) for label in self.labels}
        if kinds == {str} and "" not in self.labels:
            classes = sorted({label for label in self.labels if isinstance(label, str)})
            index = {name: i for i, name in enumerate(classes)}
            self.labels = [index[str(label)] for label in self.labels]
            return classes
        if len(kinds - {type(None)}) > 1:
            named = next(i for i, label in enumerate(self.labels) if type(label) is not type(self.labels[0]))
            raise UserError(f"labels of different kinds: {self.labels[0]!r} and {self.labels[named]!r}: use --labels")
        bad = next((label for label in self.labels if label is not None and not self._fits(label)), None)
        if bad is not None:
            raise UserError(
                f"{one_line(bad)[:50]!r} is no label: whole numbers from 0 to {MAX_LABEL}, names, or lists of numbers "
                "of one length are (--labels)"
            )
        return None

    def num_classes(self) -> int:
        """Of labels that are classes; 0 where there are none."""
        return len({label for label in self.labels if isinstance(label, int)}) if not self.missing else 0

    def _fits(self, label: Label) -> bool:
        if isinstance(label, list):
            first = self.labels[0]
            numbers = all(type(x) in (int, float) and math.isfinite(x) for x in label)
            return numbers and isinstance(first, list) and len(label) == len(first) > 0
        return type(label) is int and 0 <= label <= MAX_LABEL

    def to_json(self) -> bytes:
        """Contents of dataset.json; no labels at all if some image has none."""
        if any(label is None for label in self.labels):
            return b'{"labels": null}'
        pairs = (json.dumps([name, label]) for name, label in zip(self.names, self.labels, strict=True))
        return b'{"labels": [' + ", ".join(pairs).encode() + b"]}"


# ---------------------------------------------------------------------------------------------------------
# Latents


def encode_images(
    dataset: ImageFolderDataset,
    dest: Path,
    encoder: StabilityVAEEncoder,
    device: torch.device,
    dtype: torch.dtype,
    max_images: int | None = None,
    batch: int = 8,
    resume: bool = False,
) -> int:
    """Encode pixels as VAE latents: float32 [8, H/8, W/8], mean and standard deviation of 4 channels.

    Under torchrun the processes share the work, and the first one writes.

    Args:
        dtype: what the VAE computes in.

    Raises:
        UserError: the images are not RGB, the VAE gives NaN or infinity, or `dest` exists.
    """
    if dataset.dtype != np.uint8 or dataset.num_channels != 3:
        raise UserError(f"{dataset.path}: holds {dataset.num_channels} channels of {dataset.dtype}, not RGB images")
    if dataset.resolution % 8 != 0:
        raise UserError(f"{dataset.path}: the VAE needs a size divisible by 8, not {dataset.resolution}")

    def encode(images: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            latents = encoder.encode_pixels(images.to(device)).float()
        _check_finite(latents, names, dtype)
        return latents

    def name_of(index: int) -> str:
        return image_name(index, "img-mean-std-{}.npy")

    options = [encoder.vae_name, str(dtype)]
    return _map_dataset(dataset, dest, encode, name_of, _npy, "encode", max_images, batch, resume, options)


def decode_latents(
    dataset: ImageFolderDataset,
    dest: Path,
    encoder: StabilityVAEEncoder,
    device: torch.device,
    dtype: torch.dtype,
    max_images: int | None = None,
    batch: int = 8,
    resume: bool = False,
) -> int:
    """Decode VAE latents into images: of mean and standard deviation (8 channels) the mean, or 4 raw channels.

    Arguments and errors as `encode_images`.
    """
    if dataset.dtype != np.float32 or dataset.num_channels not in (4, 8):
        raise UserError(f"{dataset.path}: holds {dataset.num_channels} channels of {dataset.dtype}, not VAE latents")

    def decode(latents: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        raw = latents[:, :4].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pixels = encoder.decode_to_floats(whiten(raw, encoder.raw_mean, encoder.raw_std))
        _check_finite(pixels, names, dtype)
        return to_pixels(pixels)

    def png(image: np.ndarray) -> bytes:
        return encode_png(image.transpose(1, 2, 0))

    return _map_dataset(
        dataset, dest, decode, image_name, png, "decode", max_images, batch, resume, [encoder.vae_name, str(dtype)]
    )


def _check_finite(values: torch.Tensor, names: Sequence[str], dtype: torch.dtype) -> None:
    """
    Raises:
        UserError: what became of an image holds NaN or infinity; names it.
    """
    good = values.isfinite().flatten(1).all(dim=1).tolist()
    if not all(good):
        todo = "give --precision=fp32 or bf16" if dtype == torch.float16 else "is it the right --model-url, and whole?"
        raise UserError(f"{names[good.index(False)]}: the VAE makes NaN or infinity of it: {todo}")


def _map_dataset(
    dataset: ImageFolderDataset,
    dest: Path,
    function: Callable[[torch.Tensor, Sequence[str]], torch.Tensor],
    name_of: Callable[[int], str],
    file_of: Callable[[np.ndarray], bytes],
    kind: str,
    max_images: int | None,
    batch: int,
    resume: bool,
    options: list[Any],
) -> int:
    """Write `function` of all images (and their names), in order, with their labels; the number of images."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    count = len(dataset) if max_images is None else min(max_images, len(dataset))
    writer: DatasetWriter | None = None
    with distributed.fail_together():
        if rank == 0:
            facts = dict(source=dataset.info().content_hash, kind=kind, count=count, options=options)
            writer = DatasetWriter(dest, facts, resume)
    there = 0
    if writer is not None:
        there = next(i for i in range(count + 1) if i == count or name_of(i) not in writer.names)
    there = distributed.from_first(there)
    try:
        starts = range(there, count, batch * world_size)
        disable = None if rank == 0 else True
        with tqdm(total=count, initial=there, unit="img", disable=disable, dynamic_ncols=True) as progress:
            for start in starts:
                # Each process takes one batch of the round; the last of them may be short or empty.
                begin = min(start + rank * batch, count)
                indices = range(begin, min(begin + batch, count))
                part = torch.zeros(0)
                with distributed.fail_together():
                    if len(indices) > 0:
                        images = torch.from_numpy(np.stack([dataset[i][0] for i in indices]))
                        names = [f"{dataset.path}: {dataset.name(i)}" for i in indices]
                        part = function(images, names).cpu()
                parts = [part.numpy() for part in distributed.gather_to_first(part)]
                with distributed.fail_together():
                    for image in itertools.chain.from_iterable(parts):
                        assert writer is not None
                        writer.write(name_of(there), file_of(image))
                        there += 1
                        progress.update()
        with distributed.fail_together():
            if writer is not None:
                labels = [dataset.get_stored_label(i) for i in range(count)] if dataset.has_labels else None
                pairs = None if labels is None else [[name_of(i), label] for i, label in enumerate(labels)]
                writer.write("dataset.json", json.dumps({"labels": pairs}).encode())
                writer.finish()
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    return count


def _npy(array: np.ndarray) -> bytes:
    f = io.BytesIO()
    np.save(f, array.astype(np.float32))
    return f.getvalue()


# ---------------------------------------------------------------------------------------------------------
# Workers


@dataclass(frozen=True)
class _Task:
    """Converts a chunk of images; made once, run in the workers."""

    settings: ImageSettings

    def __call__(self, chunk: list[tuple[int, SourceImage, bool]]) -> list[Converted]:
        transform = make_transform(self.settings.transform, self.settings.width, self.settings.height)
        results = []
        for index, image, done in chunk:
            result = Converted(index, image.name, image.label)
            results.append(result)
            if done:
                continue
            if image.error:
                result.reason, result.is_error = f"cannot be read: {image.error}", True
                continue
            try:
                pixels = transform(decode_image(image.data, self.settings.channels))
            except Exception as err:  # a broken image can fail in any way
                kind = "damaged, or not an image" if isinstance(err, PIL.UnidentifiedImageError) else one_line(err)
                result.reason, result.is_error = f"cannot be read: {kind or type(err).__name__}", True
                continue
            if pixels is None:
                result.reason = "too small"
                continue
            result.png, result.size = encode_png(pixels), (pixels.shape[1], pixels.shape[0])
        return results


def encode_png(pixels: np.ndarray) -> bytes:
    """Uncompressed PNG file of uint8 [H, W, 1 or 3], its rows unfiltered, so that reading costs next to nothing."""
    height, width, channels = pixels.shape
    rows = np.zeros([height, 1 + width * channels], dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">2I5B", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _chunks(images: Iterator[SourceImage], names: Collection[str]) -> Iterator[list[tuple[int, SourceImage, bool]]]:
    """Images with their index, and whether they are there already (then without their data).

    Some of those that are there are made once more: that tells their size, and whether the source is still the same.
    """
    numbered, there = enumerate(images), sorted(names)
    again = {there[i] for i in evenly_spaced(len(there), MADE_AGAIN)}
    while True:
        chunk = []
        for index, image in itertools.islice(numbered, CHUNK):
            done = image_name(index) in names and image_name(index) not in again
            chunk.append((index, replace(image, data=b"") if done else image, done))
        if not chunk:
            return
        yield chunk


def _in_order(task: "_Task", chunks: Iterator[Any], workers: int) -> Generator[list[Converted], None, None]:
    """Results of `task` for each chunk, in order, with no more than a few under way."""
    if workers <= 1:
        yield from map(task, chunks)
        return
    # Forking is quick, and safe here: no thread of this process holds a lock that a worker needs.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with (
        warnings.catch_warnings(),
        concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=_begin_worker, initargs=(os.getpid(),)
        ) as pool,
    ):
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        under_way: deque[concurrent.futures.Future] = deque()
        try:
            for chunk in chunks:
                under_way.append(pool.submit(task, chunk))
                if len(under_way) >= AHEAD * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RunError("a worker process was killed (out of memory?): use fewer --workers, and --resume") from None
        finally:
            for future in under_way:
                future.cancel()


def _begin_worker(parent: int) -> None:
    """Ctrl-C is the main process's to answer; without that process, a worker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def default_workers() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
