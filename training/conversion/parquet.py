"""Parquet files of image datasets as on the Hugging Face hub: a column of images, perhaps one of labels."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError
from training.conversion.sources import Choice, Source, SourceImage

IMAGE_COLUMNS = ("image", "img", "images", "pixels", "png", "jpg", "jpeg")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class")  # the first that is there
ROWS = 64  # read at a time


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table are used, and what its metadata say about the labels."""

    image: str
    label: str | None
    classes: list[str] | None = None
    multi_label: bool = False


def parquet_tables(path: Path, tables: Sequence[Path], choice: Choice, note: str = "") -> Source:
    """The rows of some tables, one after another."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"--source={path}: Parquet files need a package: pip install pyarrow") from None

    def images() -> Iterator[SourceImage]:
        for table in tables:
            with pq.ParquetFile(table) as file:
                yield from _rows(table, file, columns[table])

    columns = {table: _choose_columns(table, pq.read_schema(table), choice) for table in tables}
    first = columns[tables[0]]
    for table in tables:
        if columns[table].classes != first.classes:
            raise UserError(f"--source={table}: other names of classes than {tables[0]}: convert them one by one")
    count = sum(pq.read_metadata(table).num_rows for table in tables)
    kind = f"Parquet files{note}, column {first.image}"
    labels = f"column {first.label}" if first.label is not None else ""
    return Source(kind, path, count, images, labels, first.classes, first.multi_label, has_keys=True)


def _rows(table: Path, file: Any, columns: _Columns) -> Iterator[SourceImage]:
    image, label = columns.image, columns.label
    row = 0
    for batch in file.iter_batches(ROWS, columns=[column for column in (image, label) if column is not None]):
        for values in batch.to_pylist():
            data = values[image]["bytes"] if isinstance(values[image], dict) else values[image]
            error = "" if isinstance(data, bytes) else f"no image in column {image}"
            yield SourceImage(f"{table.name}[{row}]", data or b"", values[label] if label is not None else None, error)
            row += 1


def _choose_columns(table: Path, schema: Any, choice: Choice) -> _Columns:
    images = [field.name for field in schema if _holds_images(field.type)]
    if not images:
        raise UserError(f"--source={table}: no column of images (there are {', '.join(schema.names)})")
    usual = [name for name in images if name.lower() in IMAGE_COLUMNS]
    image = _choose(table, "--image-key", choice.image_key, images, usual or images)
    features = {name: feature for name, feature in _class_features(schema).items() if name in schema.names}
    others = [name for name in schema.names if name not in images]
    called = [name for usual in LABEL_COLUMNS for name in others if name.lower() == usual][:1]
    label = _choose(table, "--label-key", choice.label_key, others, called or list(features))
    return _Columns(image, label, *features.get(label or "", (None, False)))


def _choose(table: Path, option: str, wanted: str | None, columns: list[str], candidates: list[str]) -> Any:
    """The column that the user wants, or the only candidate; None if there is none.

    Raises:
        UserError: there is no such column, or there are several candidates.
    """
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"--source={table}: {option}={wanted}: no such column: choose from {', '.join(columns)}")
        return wanted
    if len(candidates) > 1:
        raise UserError(f"--source={table}: which column? choose {option} from {', '.join(candidates)}")
    return candidates[0] if candidates else None


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as kinds

    is_view = getattr(kinds, "is_binary_view", lambda _kind: False)  # from pyarrow 16 on
    binary = kinds.is_binary(kind) or kinds.is_large_binary(kind) or is_view(kind)
    return binary or (kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _class_features(schema: Any) -> dict[str, tuple[list[str], bool]]:
    """Names of the classes by column, and whether each row has a list of them, as the library `datasets` notes them."""
    found = {}
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for column, feature in features.items():
            inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
            if isinstance(inner, list):  # how older versions write lists
                inner = inner[0]
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
                found[column] = ([str(name) for name in inner["names"]], inner is not feature)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {}
    return found
