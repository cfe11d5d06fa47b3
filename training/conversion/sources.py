"""What a source of images is: an iterator over encoded images with their labels, and what is known of them before."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from dnnlib.errors import RunError, UserError, one_line
from training.config.metrics import SPLITS
from training.dataset.listing import ARRAY_SUFFIX, Listing, many

Label = int | str | list[float] | None
Result = TypeVar("Result")
CLASS_FOLDERS = "class folders"  # where labels come from


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
    labels: str = ""  # where they come from: 'dataset.json', 'column label', ...; '' = there are none
    classes: list[str] | None = None  # names of the classes 0, 1, ..., where labels are numbers with names
    multi_label: bool = False  # labels are lists of classes
    num_classes: int | None = None  # None: not known before all are read
    has_keys: bool = False  # `Choice.image_key` and `label_key` mean something to it
    notes: list[str] = field(default_factory=list)  # what users should know about how it was understood, one line each

    def summary(self) -> list[str]:
        """What was found, in lines for users; the last ones are `notes`."""
        count = f", {many(self.count, 'image')}" if self.count is not None else ""
        return [f"{self.path}: {self.kind}{count}; labels: {self.labels or 'none'}", *self.notes]


@dataclass(frozen=True)
class Choice:
    """What to read of a source that offers several things.

    Args:
        split: 'train', 'validation', 'test' or 'all': which files or folders, where their names say such parts.
        image_key: which image of a sample: a column (Parquet) or the file type (WebDataset); None = by a stated rule.
        label_key: likewise the label, or a key of a sample's JSON file.
    """

    split: str = "train"
    image_key: str | None = None
    label_key: str | None = None


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


def files_of_split(path: Path, names: Sequence[str], split: str) -> tuple[list[str], str]:
    """The files that hold this part of a dataset, and a note if there are others.

    Raises:
        UserError: there are only files of other parts.
    """
    parts = {name: _part_of(name) for name in names}
    present = [part for part in SPLITS if part in parts.values()]
    if not present:
        check_no_parts(path, split)
    if split == "all" or not present:
        order = [*present, None]
        return sorted(names, key=lambda name: (order.index(parts[name]), name)), ""
    if split not in present:
        raise UserError(f"--source={path}: no {split} data in it: choose --split={' or '.join([*present, 'all'])}")
    chosen = sorted(name for name in names if parts[name] == split)
    return chosen, f" ({len(chosen)} of {len(names)} files: --split={split})" if len(chosen) < len(names) else ""


def check_no_parts(path: Path, split: str) -> None:
    """Refuse to look for a part of a dataset in a source that has none.

    Raises:
        UserError: a part other than the default was asked for.
    """
    if split not in ("train", "all"):
        raise UserError(f"--source={path}: nothing in it is called {split}: leave out --split={split}")


def _part_of(name: str) -> str | None:
    """The part of a dataset that a file's name says, or else the names of its folders."""
    for text in (PurePosixPath(name).name, str(PurePosixPath(name).parent)):
        found = {part: re.search(f"(?<![a-z])({words})", text, re.IGNORECASE) for part, words in SPLITS.items()}
        starts = {part: match.start() for part, match in found.items() if match is not None}
        if starts:
            return min(starts, key=lambda part: starts[part])
    return None


def no_images(path: Path, listing: Listing) -> UserError:
    """The error about a source that holds only other files."""
    found = "; ".join(listing.left_out()) or "it is empty"
    if listing.others[".arrow"]:
        remedy = "write Arrow files as Parquet first"
    elif path.suffix == ".npz":
        remedy = "reference batches of ADM go to calculate_metrics.py as they are; save other arrays as PNG files first"
    elif listing.others[ARRAY_SUFFIX]:
        remedy = "latents are trained on as they are, and become images by dataset_tool.py decode"
    else:
        remedy = "unpack archives first"
    return UserError(f"--source={path}: no images in it ({found}): {remedy}")
