"""Captions for a dataset: read from annotations, encoded, and stored beside the images."""

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError, one_line
from dnnlib.progress import Progress
from training.conversion.writer import DatasetWriter
from training.dataset.captions import EMPTY, contexts_name, encode_contexts
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many
from training.encoders import ContextEncoder, text_record

Texts = list[tuple[str, ...]]  # captions of each image


def read_captions(dataset: ImageFolderDataset, path: Path | None) -> Texts:
    """Captions of all images of a dataset.

    Args:
        path: annotations of MS-COCO (.json), a table of names and captions (.csv, .tsv), where an image may have
            several rows, or a text file with a line per image, in their order; None = text files of the images' names
            beside them, a caption per line. Names are those that images have, or had before `convert --keep-names`,
            with or without folders and file types.

    Raises:
        UserError: it cannot be read, or leaves out an image.
    """
    names = dataset.names_before()
    if path is None:
        return [tuple(_lines(dataset.text_beside(i), names[i])) for i in range(len(dataset))]
    if path.suffix.lower() == ".txt":
        lines = read_text(path, "--captions").splitlines()
        if len(lines) != len(names):
            raise UserError(f"--captions={path}: has {many(len(lines), 'line')} for {many(len(names), 'image')}")
        return [(line.strip(),) for line in lines]
    found = captions_by_image(path, "--captions")
    missing = [name for name in names if _stem(name) not in found]
    if missing:
        raise UserError(
            f"--captions={path}: no caption for {many(len(missing), 'image')}, such as {missing[0]} (it names "
            f"{', '.join(list(found)[:3])}, ...)"
        )
    return [tuple(found[_stem(name)]) for name in names]


def read_text(path: Path, option: str) -> str:
    """The contents of a text file that an option names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{option}={path}: cannot be read ({one_line(err)})") from None


def captions_by_image(path: Path, option: str) -> dict[str, list[str]]:
    """Captions by names of images, without folders and file types: of annotations of MS-COCO (.json), or a table of
    names and captions (.csv, .tsv).

    Args:
        option: names the file in errors.

    Raises:
        UserError: it cannot be read, or is neither.
    """
    found: dict[str, list[str]] = {}
    data = read_text(path, option)
    try:
        for name, text in _annotations(path, data):
            found.setdefault(_stem(name), []).append(one_line(text).strip())
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, csv.Error) as err:
        raise UserError(
            f"{option}={path}: neither annotations of MS-COCO nor a table with the columns filename and caption "
            f"({one_line(repr(err))[:100]})"
        ) from None
    return found


def captions_of_classes(dataset: ImageFolderDataset, template: str, names: Sequence[str] | None) -> Texts:
    """A caption per image that names its class, such as 'a seven'.

    Args:
        template: with {} in place of the class.
        names: of the classes; None = those that the dataset says.

    Raises:
        UserError: the dataset has no classes, or they have no names.
    """
    names = names or dataset.class_names
    if not dataset.has_labels:
        raise UserError(f"--template: {dataset.path} has no classes")
    if names is None or len(names) < dataset.label_dim:
        raise UserError(f"--template: {dataset.path} has {dataset.label_dim} classes: name them by --class-names")
    if template.count("{}") != 1:
        raise UserError(f"--template={template}: must hold {{}} once, for the name of the class")
    labels = [dataset.get_stored_label(i) for i in range(len(dataset))]
    if not all(isinstance(label, int) for label in labels):
        raise UserError(f"--template: the labels of {dataset.path} are no classes")
    return [(template.replace("{}", names[label]),) for label in labels if isinstance(label, int)]


def add_captions(
    dataset: ImageFolderDataset, dest: Path, texts: Texts, encoder: ContextEncoder, resume: bool = False
) -> int:
    """Write the dataset with captions and their contexts; the number of captions.

    Raises:
        UserError: `dest` exists.
        OSError: it cannot be written.
    """
    digest = dict(source=dataset.info().content_hash, texts=texts, encoder=text_record(encoder))
    writer = DatasetWriter(dest, json.loads(json.dumps(digest)), resume)
    try:
        names = [dataset.name(i) for i in range(len(dataset))]
        done: dict[tuple[str, ...], Any] = {}  # contexts of captions that many images share
        for i, name in enumerate(Progress(names, unit="img")):
            if name not in writer.names:
                writer.write(name, dataset.stored_bytes(i))
            if contexts_name(name) not in writer.names:
                if texts[i] not in done:
                    done = {} if len(done) > 100 else done
                    done[texts[i]] = encode_contexts(encoder.encode(texts[i]).numpy())
                writer.write(contexts_name(name), done[texts[i]])
        if EMPTY not in writer.names:
            writer.write(EMPTY, encode_contexts(encoder.encode([""]).numpy()))
        writer.write("dataset.json", json.dumps(_contents(dataset, names, texts, encoder)).encode())
        writer.finish()
    except BaseException:
        writer.close()
        raise
    return sum(map(len, texts))


def _contents(
    dataset: ImageFolderDataset, names: Sequence[str], texts: Texts, encoder: ContextEncoder
) -> dict[str, Any]:
    """What dataset.json says."""
    labels = None
    if dataset.has_labels:
        labels = [[name, dataset.get_stored_label(i)] for i, name in enumerate(names)]
    contents: dict[str, Any] = {"labels": labels}
    if dataset.class_names is not None:
        contents["classes"] = dataset.class_names
    if dataset.encoder_record is not None:
        contents["encoder"] = dataset.encoder_record
    captions = {"encoder": text_record(encoder), "texts": dict(zip(names, texts, strict=True))}
    return {**contents, "captions": captions}


def _stem(name: str) -> str:
    """A name without folders and file type."""
    return os.path.splitext(posixpath.basename(name.replace("\\", "/")))[0]


def _lines(text: str, name: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"the text file of {name} holds no caption")
    return lines


def _annotations(path: Path, data: str) -> Iterator[tuple[str, str]]:
    """Names of images and captions in a file."""
    if path.suffix.lower() == ".json":
        contents = json.loads(data)
        files = {image["id"]: image["file_name"] for image in contents["images"]}
        yield from [(files[item["image_id"]], item["caption"]) for item in contents["annotations"]]
        return
    rows = list(csv.reader(io.StringIO(data), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    head = [cell.strip().lower() for cell in rows[0]]
    name, caption = head.index("filename"), head.index("caption")
    yield from [(row[name], row[caption]) for row in rows[1:] if row]
