"""Labels on their way into a dataset: brought to one kind, and checked."""

import json
import math
from collections import Counter
from pathlib import Path

from dnnlib.errors import UserError, one_line
from training.conversion.label_table import LabelTable, as_numbers
from training.conversion.sources import Label
from training.dataset.labels import MAX_LABEL


class WrittenLabels:
    """Labels of the images that were written, from the sources or from a table.

    Args:
        table: None = those of the sources.
        only_names: texts are names of classes even if all are numbers.
        class_names: names of the classes 0, 1, ..., where labels are such numbers.
        multi_label: labels are lists of classes.
    """

    def __init__(
        self,
        table: LabelTable | None = None,
        only_names: bool = False,
        class_names: list[str] | None = None,
        multi_label: bool = False,
    ):
        self.names: list[str] = []
        self.class_names = class_names
        self._table = table
        self._only_names = only_names
        self._multi_label = multi_label
        self._labels: list[Label] = []
        self._missing: list[str] = []

    def add(self, name: str, source: Path, source_name: str, label: Label) -> None:
        """Note that an image of a source was written as `name`, with the label that the source has for it."""
        if self._table is not None:
            label = self._table.find(source, source_name)
        if label is None:
            self._missing.append(source_name)
        self.names.append(name)
        self._labels.append(label)

    def finish(self) -> None:
        """Bring the labels to one kind: names of classes and texts become numbers, lists of classes vectors.

        Raises:
            UserError: some images have no label, or labels are of several kinds.
        """
        if self._missing:
            self._check_missing()
            return
        if all(isinstance(label, str) and label for label in self._labels):
            self._number_classes([str(label) for label in self._labels])
        elif all(isinstance(label, float) and label.is_integer() for label in self._labels):
            self._labels = [int(label) for label in self._labels if isinstance(label, float)]
        elif all(_is_list_of_classes(label) for label in self._labels) and (
            self._multi_label or len({len(label) for label in self._labels if isinstance(label, list)}) > 1
        ):
            self._multi_hot()
        self._check_kinds()

    def _check_missing(self) -> None:
        if len(self._missing) == len(self._labels) and self._table is None:
            return  # no labels at all
        first = ", ".join(self._missing[:3])
        if self._table is None:
            raise UserError(
                f"the source's labels: none for {len(self._missing)} images, such as {first}: complete them (--labels)"
            )
        unused = self._table.unused()
        but = f" (there are rows for {', '.join(unused[:3])}, which are no images)" if unused else ""
        raise UserError(
            f"--labels={self._table.path}: none for {len(self._missing)} images, such as {first}{but}: complete them"
        )

    def _number_classes(self, texts: list[str]) -> None:
        numbers = None if self._only_names else as_numbers("the source's labels", texts)
        if numbers is not None:
            self._labels = list(numbers)
            return
        self.class_names = sorted(set(texts))
        index = {name: i for i, name in enumerate(self.class_names)}
        self._labels = [index[text] for text in texts]

    def _multi_hot(self) -> None:
        lists = [label for label in self._labels if isinstance(label, list)]
        size = max(len(self.class_names or ()), 1 + max((int(c) for classes in lists for c in classes), default=0))
        self._labels = [[int(c in set(classes)) for c in range(size)] for classes in lists]

    def _check_kinds(self) -> None:
        first = self._labels[0]
        for label in self._labels:
            if type(label) is not type(first):
                raise UserError(f"labels of different kinds: {first!r} and {label!r}: use --labels")
            if not _fits(label, first):
                raise UserError(
                    f"{one_line(label)[:50]!r} is no label: labels are whole numbers from 0 to {MAX_LABEL}, names, or "
                    "lists of numbers of one length (--labels)"
                )

    def counts(self) -> Counter[int]:
        """The number of images per class; empty where labels are no classes."""
        return Counter(label for label in self._labels if isinstance(label, int))

    def to_json(self) -> bytes:
        """Contents of dataset.json; no labels at all if some image has none."""
        if self._missing or not self._labels:
            return b'{"labels": null}'
        pairs = (json.dumps([name, label]) for name, label in zip(self.names, self._labels, strict=True))
        classes = f', "classes": {json.dumps(self.class_names)}' if self.class_names is not None else ""
        return f'{{"labels": [{", ".join(pairs)}]{classes}}}'.encode()


def _is_list_of_classes(label: Label) -> bool:
    return isinstance(label, list) and all(type(c) is int and 0 <= c <= MAX_LABEL for c in label)


def _fits(label: Label, first: Label) -> bool:
    if isinstance(label, list):
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in label)
        return numbers and isinstance(first, list) and len(label) == len(first) > 0
    return type(label) is int and 0 <= label <= MAX_LABEL
