"""Features as the published U-ViT code extracts them: `0.npy`, `1.npy`, ... with moments of latents, and labels or
contexts of captions (`0_0.npy`, `0_1.npy`, ... and `empty_context.npy`)."""

import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import UserError, one_line
from dnnlib.progress import Progress
from torch_utils.object_arrays import load_values
from training.conversion.latents import LATENT_PATTERN
from training.conversion.writer import DatasetWriter, image_name
from training.dataset.captions import EMPTY, contexts_name, encode_contexts
from training.dataset.labels import MAX_LABEL
from training.encoders import PUBLISHED_CLIP, PUBLISHED_VAE, StabilityVAEEncoder

SCALE, SCALE_OF_CAPTIONS = 0.18215, 0.2301  # of the published latents, and of those of MS-COCO
EMPTY_FILE = "empty_context.npy"
LOG_VARIANCES = (-30.0, 20.0)  # between which they are taken


def import_features(source: Path, dest: Path, scale: float | None = None, resume: bool = False) -> tuple[int, int]:
    """Write a folder of features as a dataset of latents; number of images, and of contexts.

    Args:
        source: the folder. `empty_context.npy` is there or in the folder above.
        scale: factor of the latents; None = the published one.

    Raises:
        UserError: there are no features, a file is damaged or holds more than data, or `dest` exists.
        OSError: it cannot be written.
    """
    files = _listed(source)
    empty = _empty_context(source) if any(files.values()) else None
    if scale is None:
        scale = SCALE if empty is None else SCALE_OF_CAPTIONS
    record = StabilityVAEEncoder(PUBLISHED_VAE, scale=scale, pixel_range=(-1.0, 1.0)).record
    writer = DatasetWriter(dest, dict(kind="features", count=len(files), encoder=record), resume)
    try:
        labels: list[list[Any]] = []
        texts: dict[str, list[str]] = {}
        for index, (number, captions) in enumerate(Progress(files.items(), unit="img")):
            name = image_name(index, LATENT_PATTERN)
            moments, label = _item(source / f"{number}.npy")
            labels += [] if label is None else [[name, label]]
            if name not in writer.names:
                writer.write(name, _latent(moments))
            if empty is None:
                continue
            texts[name] = [f"{number}_{k}" for k in captions]
            if contexts_name(name) not in writer.names:
                contexts = [_context(source / f"{number}_{k}.npy", empty.shape) for k in captions]
                writer.write(contexts_name(name), encode_contexts(np.stack(contexts)))
        if labels and len(labels) < len(files):
            raise UserError(f"--source={source}: only {len(labels)} of {len(files)} features have labels")
        contents: dict[str, Any] = {"labels": labels or None, "encoder": record}
        if empty is not None:
            writer.write(EMPTY, encode_contexts(empty[None]))
            kwargs = {"model": PUBLISHED_CLIP, "tokens": empty.shape[0], "width": empty.shape[1]}
            contents["captions"] = {"encoder": {"name": "TextEncoder", "kwargs": kwargs}, "texts": texts}
        writer.write("dataset.json", json.dumps(contents).encode())
        writer.finish()
    except BaseException:
        writer.close()
        raise
    return len(files), sum(map(len, texts.values()))


def read_prompt(path: Path) -> tuple[str, np.ndarray]:
    """Text and context of a test prompt (`run_vis/0.npy`).

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    values = _values(path)
    if len(values) != 2 or not isinstance(values[0], str) or not isinstance(values[1], np.ndarray):
        raise UserError(f"{path}: not a text and its context")
    return values[0], values[1]


def _listed(source: Path) -> dict[int, list[int]]:
    """Numbers of the features in a folder, and for each the numbers of its contexts."""
    if not source.is_dir():
        raise UserError(f"--source={source}: no such folder")
    captions: dict[int, list[int]] = defaultdict(list)
    numbers = []
    for path in source.iterdir():
        match = re.fullmatch(r"(\d+)(?:_(\d+))?\.npy", path.name)
        if match is not None and match[2] is None:
            numbers.append(int(match[1]))
        elif match is not None:
            captions[int(match[1])].append(int(match[2]))
    if not numbers:
        raise UserError(f"--source={source}: no features 0.npy, 1.npy, ... in this folder")
    without = [number for number in sorted(numbers) if captions and not captions.get(number)]
    if without:
        raise UserError(f"--source={source}: no caption {without[0]}_0.npy of {without[0]}.npy")
    return {number: sorted(captions.get(number, [])) for number in sorted(numbers)}


def _values(path: Path) -> list[Any]:
    try:
        return load_values(path.read_bytes())
    except (OSError, ValueError) as err:
        raise UserError(f"{path}: cannot be read ({one_line(err)[:200]})") from None


def _only_value(path: Path) -> Any:
    """What the file holds; None = several values, or no one."""
    values = _values(path)
    return values[0] if len(values) == 1 else None


def _item(path: Path) -> tuple[np.ndarray, int | None]:
    """Moments [2C, H, W] and label of a feature."""
    moments, *label = _values(path) or [None]
    is_moments = isinstance(moments, np.ndarray) and moments.dtype == np.float32 and moments.ndim == 3
    if not is_moments or len(moments) % 2 or not np.isfinite(moments).all():
        raise UserError(f"{path}: not moments of latents, float32 [2C, H, W]")
    if label and not (len(label) == 1 and type(label[0]) is int and 0 <= label[0] <= MAX_LABEL):
        raise UserError(f"{path}: not moments and a label from 0 to {MAX_LABEL}")
    return moments, label[0] if label else None


def _latent(moments: np.ndarray) -> bytes:
    """The file of mean and standard deviation, as `encode` writes it."""
    mean, log_variance = np.split(moments, 2)
    f = io.BytesIO()
    np.save(f, np.concatenate([mean, np.exp(log_variance.clip(*LOG_VARIANCES) / 2)]).astype(np.float32))
    return f.getvalue()


def _context(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    context = _only_value(path)
    is_context = isinstance(context, np.ndarray) and context.dtype == np.float32 and np.isfinite(context).all()
    if not is_context or context.shape != shape:
        raise UserError(f"{path}: not a context, float32 {list(shape)}")
    return context


def _empty_context(source: Path) -> np.ndarray:
    for folder in (source, source.parent):
        if (folder / EMPTY_FILE).is_file():
            context = _only_value(folder / EMPTY_FILE)
            if isinstance(context, np.ndarray) and context.ndim == 2:
                return _context(folder / EMPTY_FILE, context.shape)
            raise UserError(f"{folder / EMPTY_FILE}: not a context")
    raise UserError(f"--source={source}: captions need {EMPTY_FILE}, which is neither there nor in the folder above")
