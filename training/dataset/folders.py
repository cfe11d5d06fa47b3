"""What the folders of images mean: classes, parts of a dataset (train, val, test), or only places."""

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dnnlib.errors import UserError
from training.dataset.listing import many, printable

PARTS = {"train": "train|training", "validation": "val|valid|validation|dev", "test": "test|testing"}
PART_NAMES = {  # also such as training_set, seg_train and test-images
    part: re.compile(f"((seg|images?|imgs?)[ _-])?({words})([ _-]?(set|data|images?|imgs?))?", re.IGNORECASE)
    for part, words in PARTS.items()
}
# Of datasets whose images come with others that belong to them.
PICTURE_FOLDERS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "rgb", "jpegimages"}
COMPANION_FOLDERS = {"mask", "masks", "seg", "segmentation", "segmentations", "annotation", "annotations", "label"}
COMPANION_FOLDERS |= {"labels", "gt", "groundtruth", "ground_truth", "depth", "normals", "edges", "trimaps"}
COMPANION_FOLDERS |= {"segmentationclass", "segmentationobject"}
# Of cameras and phones, by their Design rule for Camera File system: 100APPLE, 101_PANA.
CAMERA_FOLDER = re.compile("[1-9][0-9]{2}[A-Z0-9_]{5}")
PER_FOLDER = 1000  # files, where folders only keep directories small
SHOWN = 5  # names in a line


@dataclass(frozen=True)
class ClassFolders:
    """Classes by folder: their sorted names, and the class of each image; no names where folders are no classes."""

    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shared_folder(names: Sequence[str]) -> str:
    """The folders that all files are in, such as 'photos/2020/', or ''."""
    first, last = min(names).split("/")[:-1], max(names).split("/")[:-1]  # all others share what these do
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(f"{part}/" for part, _part in pairs)


def parts_of_folders(names: Sequence[str]) -> dict[str, str]:
    """The part of a dataset ('train', 'validation', 'test') that each top-level folder holds, where folders are parts.

    They are where at least two of them have such names; {} where they are not, and only those with such names.
    """
    start = len(shared_folder(names))
    parts = {}
    for top in {name[start:].split("/")[0] for name in names if "/" in name[start:]}:
        part = next((part for part, name in PART_NAMES.items() if name.fullmatch(top)), None)
        if part is not None:
            parts[top] = part
    return parts if len(set(parts.values())) > 1 else {}


def folders_as_classes(where: str, names: Sequence[str], unreadable: Iterable[str] = ()) -> ClassFolders:
    """The class folders of images: the top-level ones, below what all images share, in the order of their names.

    Args:
        where: the place, for messages.
        names: of the images.
        unreadable: names of pictures that cannot be read.

    Raises:
        UserError: the folders hold pictures and what belongs to them, such as masks.
    """
    start = len(shared_folder(names))
    tops = [name[start:].split("/")[0] if "/" in name[start:] else None for name in names]
    folders = sorted({top for top in tops if top is not None})
    lower = {folder.lower(): folder for folder in folders}
    pictures, companions = PICTURE_FOLDERS & lower.keys(), COMPANION_FOLDERS & lower.keys()
    if pictures and companions:
        picture, companion = lower[min(pictures)], lower[min(companions)]
        raise UserError(
            f"{where}: the folders {picture} and {companion} look like pictures and what belongs to them, not like "
            f"classes: give the folder {picture} alone"
        )
    if len(folders) < 2:
        return ClassFolders()
    outside = [name for name, top in zip(names, tops, strict=True) if top is None]
    if outside:
        note = (
            f"no labels: {many(len(outside), 'image')} outside the folders {_some(folders)} (such as "
            f"{printable(outside[0])}): with all images in folders, these would be the classes"
        )
        return ClassFolders(notes=[note])
    if _are_thousands(names, [str(top) for top in tops]):
        return ClassFolders(notes=[f"no labels: the folders {_some(folders)} hold a thousand images each, no classes"])
    if all(map(CAMERA_FOLDER.fullmatch, folders)):
        return ClassFolders(notes=[f"no labels: the folders {_some(folders)} are those of a camera, no classes"])
    index = {folder: i for i, folder in enumerate(folders)}
    without = {name[start:].split("/")[0] for name in unreadable if "/" in name[start:]} - index.keys()
    labels = [index[str(top)] for top in tops]
    return ClassFolders([printable(folder) for folder in folders], labels, _notes(folders, sorted(without)))


def _are_thousands(names: Sequence[str], tops: Sequence[str]) -> bool:
    """Whether folders are numbered by the files in them: 00000/img00000042.png, 00001/..., or 01000/01042.png."""
    for name, top in zip(names, tops, strict=True):
        number = re.search("[0-9]+$", os.path.splitext(name)[0])
        if number is None or not re.fullmatch("[0-9]+", top):
            return False
        thousand = int(number[0]) // PER_FOLDER
        if int(top) not in (thousand, thousand * PER_FOLDER):
            return False
    return True


def _notes(folders: list[str], without: list[str]) -> list[str]:
    notes = []
    if all(re.fullmatch("[0-9]+", folder) for folder in folders) and folders != sorted(folders, key=int):
        wrong = next(i for i, folder in enumerate(folders) if int(folder) != i)
        notes.append(
            f"class folders are sorted as text ({_some(folders)}): folder {folders[wrong]} is class {wrong}; "
            "for their own numbers, pad them with zeros (00, 01, ...)"
        )
    folded: dict[str, str] = {}
    for folder in folders:
        other = folded.setdefault(folder.casefold(), folder)
        if other != folder:
            notes.append(f"two class folders differ only in capital letters: {printable(other)}, {printable(folder)}")
    if without:
        notes.append(f"not among the classes: {_some(without)}, which hold only pictures of unreadable kinds")
    return notes


def _some(folders: Sequence[str]) -> str:
    shown = ", ".join(map(printable, folders[:SHOWN]))
    return f"{shown}, ..." if len(folders) > SHOWN else shown
