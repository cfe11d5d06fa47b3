"""What a source of images is: an iterator over encoded images with their labels, and what is known of them before."""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from dnnlib.errors import RunError, UserError, one_line
from training.config.metrics import SPLITS
from training.dataset.decoding import image_suffixes

Label = int | str | list[float] | None
Result = TypeVar("Result")
MAX_DIGITS = 9  # of a label that is a number


@dataclass(frozen=True)
class SourceImage:
    """An image as it is stored.

    `data` is an encoded file, or pixels: uint8 [H, W] or [H, W, C]. `label` is the number or name of a class, a vector,
    or None. `name` is what messages call it. `error` says why it could not be read, if it could not.
    """

    name: str
    data: bytes | np.ndarray
    label: Label = None
    error: str = ""


@dataclass(frozen=True)
class Source:
    """The images of one place.

    Each call of `images` reads them from the first one on. It raises a UserError where damage makes all further images
    unreadable; an image that alone cannot be read has an `error`.
    """

    kind: str
    path: Path
    count: int | None  # None: not known before all are read
    images: Callable[[], Iterator[SourceImage]]
    classes: list[str] | None = None  # names of the classes 0, 1, ..., where labels are numbers with names


def naming_damage(path: Path, function: Callable[[], Result]) -> Result:
    """The result of `function`, which reads `path`: a damaged file can fail in any way.

    Raises:
        UserError: it failed; names the path.
    """
    try:
        return function()
    except (UserError, RunError, MemoryError):
        raise
    except Exception as err:
        reason = one_line(err) or type(err).__name__
        raise UserError(f"--source={path}: damaged ({reason}): copy or download it again") from None


def images_naming_damage(path: Path, images: Iterator[SourceImage]) -> Iterator[SourceImage]:
    """The same images, with errors of reading `path` as those of `naming_damage`."""
    while (image := naming_damage(path, lambda: next(images, None))) is not None:
        yield image


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and not a system's own."""
    parts = posixpath.normpath(name).split("/")
    hidden = any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts)
    return os.path.splitext(name)[1].lower() in image_suffixes() and not hidden


def class_of(text: str) -> int | str:
    """The number or name of a class."""
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else text


def files_of_split(path: Path, names: Sequence[str], split: str) -> tuple[list[str], str]:
    """The files that hold this part of a dataset, and a note if there are others.

    Raises:
        UserError: there are only files of other parts.
    """
    parts = {name: _part_of(name) for name in names}
    present = [part for part in SPLITS if part in parts.values()]
    if split == "all" or not present:
        order = [*present, None]
        return sorted(names, key=lambda name: (order.index(parts[name]), name)), ""
    if split not in present:
        raise UserError(f"--source={path}: no {split} data in it: choose --split={' or '.join([*present, 'all'])}")
    chosen = sorted(name for name in names if parts[name] == split)
    return chosen, f" ({len(chosen)} of {len(names)} files: --split={split})" if len(chosen) < len(names) else ""


def _part_of(name: str) -> str | None:
    """The part of a dataset that a file's name says, or else the names of its folders."""
    for text in (PurePosixPath(name).name, str(PurePosixPath(name).parent)):
        found = {part: re.search(f"(?<![a-z])({words})", text) for part, words in SPLITS.items()}
        starts = {part: match.start() for part, match in found.items() if match is not None}
        if starts:
            return min(starts, key=lambda part: starts[part])
    return None


def no_images(path: Path, names: Iterable[str]) -> UserError:
    """The error about a source that holds only other files."""
    found = sorted({os.path.splitext(name)[1] or PurePosixPath(name).name for name in names})[:5]
    return UserError(
        f"--source={path}: no images in it (found {', '.join(found) if found else 'no files'}); unpack archives first"
    )
