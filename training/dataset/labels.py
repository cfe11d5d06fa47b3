"""Labels of a dataset: of its dataset.json, or of its class folders."""

import json
import posixpath
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import UserError, one_line
from training.dataset.folders import folders_as_classes, parts_of_folders
from training.dataset.listing import Listing, is_array, many, printable
from training.dataset.storage import Storage

DESCRIPTION = "dataset.json"
MAX_LABEL = 10**6
SHOWN = 10  # classes in a line


@dataclass(frozen=True)
class LabelFile:
    """The contents of a dataset.json: labels by name of the image (None: there are none), names of the classes, the
    encoder of latents, and captions."""

    labels: dict[str, Any] | None
    class_names: list[str] | None = None
    encoder: dict[str, Any] | None = None
    captions: dict[str, Any] | None = None


@dataclass(frozen=True)
class Labels:
    """The labels of a dataset and where they come from.

    `values` are int64 [n] or float32 [n, label_dim]; None where there are no labels. `source` is 'dataset.json' or
    'class folders'; `notes` are lines for the user. `encoder` is the record of what made the latents.
    """

    values: np.ndarray | None = None
    source: str = ""
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    encoder: dict[str, Any] | None = None


def labels_from_folders(where: str, listing: Listing) -> Labels:
    """Classes by top-level folder, see `folders_as_classes`.

    Raises:
        UserError: the folders are parts of a dataset, or pictures and their masks.
    """
    parts = parts_of_folders(listing.images)
    if parts:
        raise UserError(
            f"{where}: the folders {', '.join(sorted(parts))} are parts of a dataset, not classes: give the folder of "
            "one part, or convert it (dataset_tool.py convert --split)"
        )
    folders = folders_as_classes(where, listing.images, listing.unreadable)
    if not folders.names:
        return Labels(notes=folders.notes + listing.unused_tables())
    return Labels(np.array(folders.labels, np.int64), "class folders", folders.names, folders.notes)


def labels_from_json(where: str, text: bytes, names: Sequence[str]) -> Labels:
    """Labels of the images `names` in a dataset.json.

    Raises:
        UserError: the file is of another form, lacks images, or holds labels of other kinds.
    """
    file = parse_labels_json(where, text)
    if file.labels is None:
        return Labels(encoder=file.encoder)
    values = _as_array(where, file.labels, names)
    size = int(values.max()) + 1 if values.ndim == 1 else values.shape[1]
    if file.class_names is not None and len(file.class_names) < size:
        raise UserError(f"{where}: has names of {len(file.class_names)} classes, but labels of {size}: complete them")
    absent = sorted(file.labels.keys() - set(names))
    notes = []
    if absent:
        notes.append(f"missing: {many(len(absent), 'image')} that dataset.json lists, such as {one_line(absent[0])}")
    return Labels(values, "dataset.json", file.class_names, notes, file.encoder)


def _as_array(where: str, labels: dict[str, Any], names: Sequence[str]) -> np.ndarray:
    missing = [name for name in names if name not in labels]
    if missing:
        raise UserError(
            f"{where} has no label for {len(missing)} images, such as {', '.join(map(printable, missing[:3]))}"
        )
    try:
        array = np.array([labels[name] for name in names])
    except ValueError:
        raise UserError(f"{where}: labels differ in length") from None
    if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) and 0 <= array.min() <= array.max() <= MAX_LABEL:
        return array.astype(np.int64)
    if array.ndim == 2 and array.size > 0 and np.issubdtype(array.dtype, np.number):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if np.isfinite(array).all():
            return array
    raise UserError(f"{where}: labels must be all integers from 0 to {MAX_LABEL}, or all lists of finite numbers")


def parse_labels_json(where: str, text: bytes) -> LabelFile:
    """The contents of a dataset.json.

    Raises:
        UserError: it is of another form, or an image has two different labels.
    """
    labels: dict[str, Any] = {}
    try:
        contents = json.loads(text)
        listed, classes, encoder = contents["labels"], contents.get("classes"), contents.get("encoder")
        captions = contents.get("captions")
        for name, label in listed if listed is not None else ():
            name = posixpath.normpath(name.replace("\\", "/"))
            if labels.setdefault(name, label) != label:
                raise UserError(
                    f"{where}: {one_line(name)} is listed twice, as {one_line(labels[name])} and {one_line(label)}"
                )
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise TypeError("classes must be a list of names")
        if encoder is not None and not isinstance(encoder, dict):
            raise TypeError("encoder must have a name and kwargs")
        if captions is not None and not isinstance(captions, dict):
            raise TypeError("captions must have an encoder and texts")
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as err:
        reason = one_line(err)
        raise UserError(f"{where} is not of the form {{'labels': [[name, label], ...]}}: {reason}") from None
    return LabelFile(labels if listed is not None else None, classes, encoder, captions)


def describe_classes(counts: Mapping[int, int], names: Sequence[str] | None) -> str:
    """Such as '3 classes: cat (8), dog (8), emu (2)', from the number of images per class."""
    shown = [f"{one_line(names[label]) if names else label} ({counts[label]})" for label in sorted(counts)[:SHOWN]]
    more = ", ..." if len(counts) > SHOWN else ""
    return f"{many(len(counts), 'class')}: {', '.join(shown)}{more}"


def only_the_first(taken: int, total: int, classes: int, all_classes: int | None = None) -> list[str]:
    """A line that says what --max-images has left out, if anything.

    Args:
        taken, total: numbers of images.
        classes, all_classes: numbers of classes in those that were taken, and in all; 0 = there are none, None = it is
            not known.
    """
    if taken >= total:
        return []
    some = f"{classes} of {many(all_classes, 'class')}" if all_classes else many(classes, "class")
    missing = ": for all classes, leave --max-images out" if all_classes is not None and classes < all_classes else ""
    return [f"only the first {taken} of {many(total, 'image')}{f', which have {some}' if classes else ''}{missing}"]


def load_labels(path: Path, storage: Storage, listing: Listing, wanted: bool) -> Labels:
    """The labels of a dataset, in the order of its images; what is said of an encoder where they are not `wanted`.

    Raises:
        UserError: they are damaged or incomplete.
    """
    if not wanted:
        parts = sorted(parts_of_folders(listing.images))
        notes = [f"images of several parts of a dataset: {', '.join(parts)}"] if parts else []
        described = read_description(path, storage) if is_array(listing.images[0]) else None
        return Labels(notes=notes, encoder=None if described is None else described.encoder)
    data = read_json(path, storage)
    if data is None:
        return labels_from_folders(str(path), listing)
    return labels_from_json(f"{path}: {DESCRIPTION}", data, listing.images)


def read_description(path: Path, storage: Storage) -> LabelFile | None:
    """What dataset.json says; None = there is none.

    Raises:
        UserError: it is damaged.
    """
    data = read_json(path, storage)
    return None if data is None else parse_labels_json(f"{path}: {DESCRIPTION}", data)


def read_json(path: Path, storage: Storage) -> bytes | None:
    """The contents of dataset.json; None = there is none.

    Raises:
        UserError: it cannot be read.
    """
    if DESCRIPTION not in storage.names:
        return None
    try:
        return bytes(storage.read(storage.names.index(DESCRIPTION)))
    except (ValueError, OSError, struct.error, zlib.error) as err:
        raise UserError(f"{path}: {DESCRIPTION}: cannot be read ({one_line(err)})") from None
