"""Labels of a dataset: of its dataset.json, or of its class folders."""

import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np

from dnnlib.errors import UserError, one_line

MAX_LABEL = 10**6


def labels_from_folders(names: Sequence[str]) -> np.ndarray | None:
    """Classes int64 [n]: the index of each image's top-level folder among their sorted names.

    None where images lie outside folders, or all in one.
    """
    tops = [name.split("/")[0] if "/" in name else None for name in names]
    classes = sorted({top for top in tops if top is not None})
    if len(classes) < 2 or None in tops:
        return None
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[top] for top in tops if top is not None])


def labels_from_json(where: str, text: bytes, names: Sequence[str]) -> np.ndarray | None:
    """Labels of the images `names` in a dataset.json: int64 [n], or vectors float32 [n, label_dim].

    None where the file says that there are none.

    Raises:
        UserError: the file is of another form, lacks images, or holds labels of other kinds.
    """
    labels = parse_labels_json(where, text)
    if labels is None:
        return None
    missing = [name for name in names if name not in labels]
    if missing:
        raise UserError(f"{where} has no label for {len(missing)} images, such as {', '.join(missing[:3])}")
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


def parse_labels_json(where: str, text: bytes) -> dict[str, Any] | None:
    """The labels of a dataset.json by image name, None if it says that there are none.

    Raises:
        UserError: it is of another form, or an image has two different labels.
    """
    labels: dict[str, Any] = {}
    try:
        listed = json.loads(text)["labels"]
        for name, label in listed if listed is not None else ():
            name = posixpath.normpath(name.replace("\\", "/"))
            if labels.setdefault(name, label) != label:
                raise UserError(f"{where}: {name} is listed twice, as {labels[name]} and {label}")
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as err:
        reason = one_line(err)
        raise UserError(f"{where} is not of the form {{'labels': [[name, label], ...]}}: {reason}") from None
    return labels if listed is not None else None
