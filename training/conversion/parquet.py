"""Parquet files of image datasets as on the Hugging Face hub: a column of images, perhaps one of labels."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError
from training.conversion.sources import Source, SourceImage

IMAGE_COLUMNS = ("image", "img", "images", "pixels", "png", "jpg", "jpeg")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
ROWS = 64  # read at a time


def parquet_tables(path: Path, tables: Sequence[Path], note: str = "") -> Source:
    """The rows of some tables, one after another."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"--source={path}: Parquet files need a package: pip install pyarrow") from None

    def images() -> Iterator[SourceImage]:
        for table in tables:
            with pq.ParquetFile(table) as file:
                yield from _rows(table, file)

    schemas = {table: pq.read_schema(table) for table in tables}
    classes = {table: _class_names(schema) for table, schema in schemas.items()}
    for table, schema in schemas.items():
        _columns(table, schema)
        if classes[table] != classes[tables[0]]:
            raise UserError(f"--source={table}: other names of classes than {tables[0]}: convert them one by one")
    count = sum(pq.read_metadata(table).num_rows for table in tables)
    return Source(f"Parquet files{note}", path, count, images, classes[tables[0]])


def _rows(table: Path, file: Any) -> Iterator[SourceImage]:
    image, label = _columns(table, file.schema_arrow)
    row = 0
    for batch in file.iter_batches(ROWS, columns=[column for column in (image, label) if column is not None]):
        for values in batch.to_pylist():
            data = values[image]["bytes"] if isinstance(values[image], dict) else values[image]
            error = "" if isinstance(data, bytes) else f"no image in column {image}"
            yield SourceImage(f"{table.name}[{row}]", data or b"", values[label] if label is not None else None, error)
            row += 1


def _columns(table: Path, schema: Any) -> tuple[str, str | None]:
    """Names of the columns of images and labels."""
    import pyarrow.types as kinds

    def holds_images(kind: Any) -> bool:
        is_view = getattr(kinds, "is_binary_view", lambda _kind: False)  # from pyarrow 16 on
        binary = kinds.is_binary(kind) or kinds.is_large_binary(kind) or is_view(kind)
        return binary or (kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    images = [field.name for field in schema if holds_images(field.type)]
    if not images:
        raise UserError(f"--source={table}: no column of images (there are {', '.join(schema.names)})")
    usual = [name for name in images if name.lower() in IMAGE_COLUMNS]
    known = [name for name in _class_labels(schema) if name in schema.names]
    labels = known or [name for name in schema.names if name.lower() in LABEL_COLUMNS]
    return (usual or images)[0], labels[0] if labels else None


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Names of the classes by column, which the library `datasets` keeps beside the columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _class_names(schema: Any) -> list[str] | None:
    """Names of the classes 0, 1, ... of the column of labels."""
    return next(iter(_class_labels(schema).values()), None)
