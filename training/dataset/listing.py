"""Which files are images, and which are left out, by their names: the same rule wherever images are read."""

import contextlib
import functools
import importlib
import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import PIL.Image

from training.config.data import EDIT_NAME, RECORD_NAME

ARRAY_SUFFIX = ".npy"
CONTEXTS_SUFFIX = ".contexts"  # of captions, beside images
NAMES_FILE = "names.json"  # what the images of a dataset were called before
OUR_FILES = ("dataset.json", "report.json", RECORD_NAME, EDIT_NAME, NAMES_FILE)  # beside images
# Folders in which systems keep thumbnails, deleted files and earlier versions; all of them may hold images.
SYSTEM_FOLDERS = ("__MACOSX", "Network Trash Folder", "Temporary Items")  # macOS
SYSTEM_FOLDERS += ("@eaDir", "@tmp", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot")  # NAS
SYSTEM_FOLDERS += ("$RECYCLE.BIN", "System Volume Information", "lost+found")  # Windows, Linux
HIDDEN = re.compile(rf"(?:^|/)(\.(?!\.?(?:/|$))[^/]*|{'|'.join(map(re.escape, SYSTEM_FOLDERS))})(?=/|$)")
# Formats that Pillow only recognises, or hands to a program.
UNREADABLE_FORMATS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"})
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
# Other pictures that cannot be read: of cameras, vector graphics, and newer formats.
OTHER_PICTURES = {".avif", ".jxl", ".jxr", ".svg", ".exr", ".hdr", ".eps", ".wmf", ".emf", ".xcf", ".raw", ".dng"}
OTHER_PICTURES |= {".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef", ".srw"}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
RARE = 100  # files of a type: text files beside the images are more
SHOWN = 5  # names and suffixes in a line


@functools.cache
def image_suffixes() -> frozenset[str]:
    """File types of images that can be read, such as '.png'; with pillow-heif also those of HEIF."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    formats = PIL.Image.registered_extensions()
    return frozenset(
        suffix for suffix, kind in formats.items() if kind in PIL.Image.OPEN and kind not in UNREADABLE_FORMATS
    )


def suffix_of(name: str) -> str:
    """The file type of a name in small letters, such as '.png', or ''."""
    return os.path.splitext(name)[1].lower()


def is_array(name: str) -> bool:
    """Whether a file is an array by its name."""
    return suffix_of(name) == ARRAY_SUFFIX


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and not hidden."""
    return suffix_of(name) in image_suffixes() and HIDDEN.search(name) is None


def printable(name: str) -> str:
    """A file name as text on one line: bytes that are none, as old archives have them, become '\\xe9' and the like, and
    so do line feeds and other characters that control a terminal."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def many(count: int, noun: str) -> str:
    """'1 image', '2 images', '2 classes'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def counted(counts: Counter[str]) -> str:
    """The most common entries, such as '8 .jpg, 2 .png'."""
    shown = ", ".join(f"{count} {printable(name)}" for name, count in counts.most_common(SHOWN))
    return shown + (f", and {len(counts) - SHOWN} other kinds" if len(counts) > SHOWN else "")


@dataclass
class Listing:
    """The files of a place, by what is done with them."""

    images: list[str] = field(default_factory=list)  # names, in the order given
    positions: list[int] = field(default_factory=list)  # of these among the names given
    kinds: Counter[str] = field(default_factory=Counter)  # of these, by file type
    hidden: Counter[str] = field(default_factory=Counter)  # images in hidden files and folders, by that file or folder
    unreadable: list[str] = field(default_factory=list)  # names of pictures of other types
    sheets: list[str] = field(default_factory=list)  # names of contact sheets of the images
    others: Counter[str] = field(default_factory=Counter)  # all other files, by type
    odd: list[int] = field(default_factory=list)  # positions of those of rare types, whose names may be damaged
    tables: list[str] = field(default_factory=list)  # names of those among them that may hold labels

    def unused_tables(self) -> list[str]:
        """A line that says how labels get used that may be in tables beside the images, if there are any."""
        if not self.tables:
            return []
        name, more = printable(self.tables[0]), len(self.tables) - 1
        others = f" (and {more} more)" if more else ""
        return [f"{name}{others} may hold labels: they are taken by dataset_tool.py convert --labels"]

    def left_out(self) -> list[str]:
        """One line for each reason why files are left out."""
        lines = []
        if self.hidden:
            lines.append(f"left out: {many(self.hidden.total(), 'hidden image')} ({counted(self.hidden)})")
        if self.unreadable:
            kinds = Counter(map(suffix_of, self.unreadable))
            heif = "for HEIF, pip install pillow-heif; else " if any(kind in HEIF_SUFFIXES for kind in kinds) else ""
            lines.append(
                f"left out: {many(len(self.unreadable), 'picture')} of unreadable kinds ({counted(kinds)}): "
                f"{heif}convert to PNG or JPEG"
            )
        if self.sheets:
            lines.append(
                f"left out: {many(len(self.sheets), 'contact sheet')} ({', '.join(map(printable, self.sheets))})"
            )
        if self.others:
            lines.append(f"left out: {many(self.others.total(), 'other file')} ({counted(self.others)})")
        return lines


def contact_sheets(names: Iterable[str], read: Callable[[str], bytes | memoryview]) -> set[str]:
    """The files that are contact sheets of images beside them, as the record of generated images says.

    Args:
        read: name -> contents.
    """
    found: set[str] = set()
    for name in names:
        if posixpath.basename(name) == RECORD_NAME:
            # A damaged record, which can fail in any way, is no reason to refuse images.
            with contextlib.suppress(Exception):
                sheets = json.loads(bytes(read(name))).get("sheets", [])
                found |= {posixpath.join(posixpath.dirname(name), sheet) for sheet in sheets}
    return found


def list_files(names: Iterable[str], arrays: bool = False, sheets: Collection[str] = ()) -> Listing:
    """Sort files by what is done with them.

    Args:
        names: of all files, relative to the place that they are in.
        arrays: `.npy` files count as images.
        sheets: names of those that are contact sheets.
    """
    listing, readable = Listing(), image_suffixes() | ({ARRAY_SUFFIX} if arrays else set())
    positions_by_type: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        suffix, hidden = suffix_of(name), HIDDEN.search(name)
        if name in sheets:
            listing.sheets.append(name)
        elif hidden is not None:
            if suffix in readable:
                listing.hidden[hidden[1]] += 1
        elif suffix in readable:
            listing.images.append(name)
            listing.positions.append(position)
            listing.kinds[suffix] += 1
        elif suffix in HEIF_SUFFIXES or suffix in OTHER_PICTURES:
            listing.unreadable.append(name)
        elif posixpath.basename(name) not in OUR_FILES and suffix != CONTEXTS_SUFFIX:
            listing.others[suffix or "without a suffix"] += 1
            positions_by_type[suffix].append(position)
            if suffix in TABLE_SUFFIXES:
                listing.tables.append(name)
    listing.odd = [position for some in positions_by_type.values() if len(some) <= RARE for position in some]
    return listing
