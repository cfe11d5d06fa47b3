"""Labels on their way into a dataset: from tables that users give, and checked to be of one kind."""

import csv
import io
import json
import math
import posixpath
import re
from pathlib import Path

from dnnlib.errors import UserError, one_line
from training.conversion.sources import Label, class_of, is_image
from training.dataset.labels import MAX_LABEL, parse_labels_json


def read_label_file(path: Path) -> dict[str, Label]:
    """Labels by image name from a table of filename,label (with or without a line of headings), or a dataset.json.

    Labels that are all whole numbers are numbers; else they are names of classes.

    Raises:
        UserError: there is no such file, or it is of another form.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            return parse_labels_json(f"--labels={path}", data) or {}
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row]
    except (OSError, UnicodeError, csv.Error) as err:
        raise UserError(f"--labels={path}: cannot be read ({err})") from None
    if rows and not is_image(rows[0][0]) and (len(rows) == 1 or is_image(rows[1][0])):
        rows = rows[1:]  # headings
    if not rows:
        raise UserError(f"--labels={path}: holds no labels")
    labels: dict[str, str] = {}
    for row in rows:
        if len(row) != 2 or not row[0].strip() or not row[1].strip():
            raise UserError(f"--labels={path}: {one_line(','.join(row))!r} is not of the form filename,label")
        name, label = posixpath.normpath(row[0].strip().replace("\\", "/")), row[1].strip()
        if labels.setdefault(name, label) != label:
            raise UserError(f"--labels={path}: {name} is listed twice, as {labels[name]} and {label}")
    return _numbers_or_names(path, labels)


def _numbers_or_names(path: Path, labels: dict[str, str]) -> dict[str, Label]:
    classes = {name: class_of(label) for name, label in labels.items()}
    names = [label for label in classes.values() if isinstance(label, str)]
    if not names:
        return dict(classes)
    odd = next((name for name in names if re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", name)), None)
    if odd is not None:
        raise UserError(
            f"--labels={path}: {odd[:50]!r} beside other labels: classes have whole numbers from 0, or names"
        )
    return dict(labels)


class WrittenLabels:
    """Labels of the images that were written, from the sources or from a table.

    Args:
        table: labels by name of the image, with or without its folders; None = those of the sources.
    """

    def __init__(self, table: dict[str, Label] | None):
        self.names: list[str] = []
        self._table = table
        self._by_base: dict[str, Label] = {}  # without folders, where that is one label
        for name, label in (table or {}).items():
            base = name.rsplit("/", 1)[-1]
            self._by_base[base] = label if self._by_base.get(base, label) == label else None
        self._labels: list[Label] = []
        self._missing: list[str] = []

    def add(self, name: str, source_name: str, label: Label) -> None:
        """Note that an image of the source was written as `name`, with the label that the source has for it."""
        if self._table is not None:
            label = self._table.get(source_name, self._by_base.get(source_name.rsplit("/", 1)[-1]))
        if label is None:
            self._missing.append(source_name)
        self.names.append(name)
        self._labels.append(label)

    def number_classes(self) -> list[str] | None:
        """Turn names of classes into numbers, and return the sorted names; None where labels are no names.

        Raises:
            UserError: some images have no label, or labels are of several kinds.
        """
        if self._missing and len(self._missing) < len(self._labels) + (self._table is not None):
            where = "--labels" if self._table is not None else "the source's labels"
            first = ", ".join(self._missing[:3])
            raise UserError(f"{where}: none for {len(self._missing)} images, such as {first}: complete them (--labels)")
        kinds = {type(label) for label in self._labels}
        if kinds == {str} and "" not in self._labels:
            classes = sorted({label for label in self._labels if isinstance(label, str)})
            index = {name: i for i, name in enumerate(classes)}
            self._labels = [index[str(label)] for label in self._labels]
            return classes
        if len(kinds - {type(None)}) > 1:
            other = next(label for label in self._labels if type(label) is not type(self._labels[0]))
            raise UserError(f"labels of different kinds: {self._labels[0]!r} and {other!r}: use --labels")
        bad = next((label for label in self._labels if label is not None and not self._fits(label)), None)
        if bad is not None:
            raise UserError(
                f"{one_line(bad)[:50]!r} is no label: labels are whole numbers from 0 to {MAX_LABEL}, names, or lists "
                "of numbers of one length (--labels)"
            )
        return None

    def num_classes(self) -> int:
        """The number of different classes; 0 where labels are no classes."""
        return len({label for label in self._labels if isinstance(label, int)}) if not self._missing else 0

    def _fits(self, label: Label) -> bool:
        if isinstance(label, list):
            first = self._labels[0]
            numbers = all(type(x) in (int, float) and math.isfinite(x) for x in label)
            return numbers and isinstance(first, list) and len(label) == len(first) > 0
        return type(label) is int and 0 <= label <= MAX_LABEL

    def to_json(self) -> bytes:
        """Contents of dataset.json; no labels at all if some image has none."""
        if any(label is None for label in self._labels):
            return b'{"labels": null}'
        pairs = (json.dumps([name, label]) for name, label in zip(self.names, self._labels, strict=True))
        return b'{"labels": [' + ", ".join(pairs).encode() + b"]}"
