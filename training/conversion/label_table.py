"""Labels that users give for images: tables as Kaggle and spreadsheets have them, or a dataset.json."""

import csv
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from dnnlib.errors import UserError, one_line
from training.conversion.sources import Choice, Label
from training.dataset.labels import parse_labels_json
from training.dataset.listing import HEIF_SUFFIXES, OTHER_PICTURES, image_suffixes, suffix_of

IMAGE_HEADINGS = "filename file_name file image image_id imageid image_name imagename img img_id id name path filepath"
LABEL_HEADINGS = "label labels class class_id class_name classname category category_id target cls y breed"
INDEX_HEADINGS = ("", "index", "unnamed: 0")
DELIMITERS = ",;\t| "
CLASS_NUMBER, NUMBER = r"[0-9]{1,9}(\.0+)?", r"[-+]?[0-9]*\.?[0-9]+"


class LabelTable:
    """Labels by name of the image, which need not be written as the source writes it.

    An image is found by as many of its last folders as the table has, or by its file name alone; if need be in any case
    of letters, and without its file type. Names may begin with the source: `photos/0.png` for 0.png of --source=photos.

    Args:
        path: of the table, for messages.
        labels: as the table has them.
        class_names: names of the classes 0, 1, ..., if it has them.
    """

    def __init__(self, path: Path, labels: dict[str, Label], class_names: list[str] | None = None):
        self.path = path
        self.class_names = class_names
        self._labels = labels
        self._indices: list[dict[str, list[str]]] = []  # rows by ending of their name; see `_FORMS`
        self._users: dict[str, str] = {}  # the image of each row

    def find(self, source: Path, name: str) -> Label:
        """The label of an image of a source, None if the table has none, or several that might be meant.

        Raises:
            UserError: the row belongs to another image just as well.
        """
        full = f"{source.stem if source.is_file() else source.resolve().name}/{name}"
        place = f"{source}/{name}"
        for level, form in enumerate(_FORMS):
            for ending in _endings(form(full)):
                rows = self._index(level).get(ending, [])
                labels = [self._labels[row] for row in rows]
                if rows and all(label == labels[0] for label in labels):
                    user = self._users.setdefault(rows[0], place)
                    if user != place and len(rows) == 1:
                        raise UserError(
                            f"--labels={self.path}: its row {rows[0]} fits {user} as well as {place}: "
                            "write the source or folder before the name"
                        )
                    return labels[0]
        return None

    def __len__(self) -> int:
        return len(self._labels)

    def unused(self) -> list[str]:
        """Names in the table that no image has."""
        return [row for row in self._labels if row not in self._users]

    def _index(self, level: int) -> dict[str, list[str]]:
        while len(self._indices) <= level:
            form, index = _FORMS[len(self._indices)], {}
            for row in self._labels:
                for ending in _endings(form(row)):
                    index.setdefault(ending, []).append(row)
            self._indices.append(index)
        return self._indices[level]


def _endings(name: str) -> Iterator[str]:
    """'a/b/c' -> 'a/b/c', 'b/c', 'c'."""
    parts = name.split("/")
    return ("/".join(parts[i:]) for i in range(len(parts)))


def _without_suffix(name: str) -> str:
    suffix = suffix_of(name)
    picture = suffix in image_suffixes() or suffix in HEIF_SUFFIXES or suffix in OTHER_PICTURES
    return name[: -len(suffix)] if picture else name


def _folded(name: str) -> str:
    """The name in one form for all cases of letters, and for accents as macOS codes them in names of files."""
    return unicodedata.normalize("NFC", name).casefold()


# How names are compared: exactly, then in any case of letters, then without file types, too.
_FORMS = (str, _folded, lambda name: _folded(_without_suffix(name)))


def read_label_file(path: Path, choice: Choice) -> LabelTable:
    """Labels by image name from a table of filename,label (with or without headings), JSON lines, or a dataset.json.

    Labels that are all whole numbers (also written 0.0) are numbers; else they are names of classes.

    Args:
        choice: headings of the columns of names and labels, if they are not the usual ones.

    Raises:
        UserError: there is no such file, or it is of another form.
    """
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".json":
            contents = parse_labels_json(f"--labels={path}", data)
            return LabelTable(path, contents.labels or {}, contents.class_names)
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        read = _read_json_lines if path.suffix.lower() == ".jsonl" else _read_rows
        headings, rows = read(path, data.decode(encoding))
    except (OSError, UnicodeError, csv.Error) as err:
        raise UserError(f"--labels={path}: cannot be read ({err})") from None
    name_column, label_column = _choose_columns(path, headings, rows, choice)
    labels: dict[str, Label] = {}
    for row in rows:
        name, label = row[name_column], row[label_column]
        if not name or not label:
            raise _malformed(path, row)
        name = posixpath.normpath(name.replace("\\", "/"))
        if labels.setdefault(name, label) != label:
            raise UserError(f"--labels={path}: {name} is listed twice, as {labels[name]} and {label}")
    numbers = as_numbers(f"--labels={path}", [str(label) for label in labels.values()])
    return LabelTable(path, labels if numbers is None else dict(zip(labels, numbers, strict=True)))


def as_numbers(where: str, texts: Sequence[str]) -> list[int] | None:
    """Classes that are all written as whole numbers, such as '3' or '3.0'; None if they are names.

    Raises:
        UserError: one is a number that is no class.
    """
    is_class = [re.fullmatch(CLASS_NUMBER, text) is not None for text in texts]
    if all(is_class):
        return [int(float(text)) for text in texts]
    odd = next((t for t, good in zip(texts, is_class, strict=True) if not good and re.fullmatch(NUMBER, t)), None)
    if odd is not None:
        raise UserError(f"{where}: {odd[:50]!r} is no class: classes have whole numbers from 0, or names")
    return None


def _malformed(path: Path, row: Sequence[str]) -> UserError:
    return UserError(f"--labels={path}: {one_line(','.join(row))!r} is not of the form filename,label")


def _read_rows(path: Path, text: str) -> tuple[list[str], list[list[str]]]:
    """Headings (empty ones where there are none) and rows of equal length.

    Raises:
        UserError: there are no rows, or rows differ in length.
    """
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    delimiter = next((delimiter for delimiter in DELIMITERS if delimiter in first), ",")
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    rows = [row for row in ([cell.strip() for cell in row] for row in reader) if any(row)]
    width = len(rows[0]) if rows else 0
    headings = [heading.lower() for heading in rows.pop(0)] if rows and _are_headings(rows) else [""] * width
    if not rows:
        raise UserError(f"--labels={path}: holds no labels")
    bad = next((row for row in rows if len(row) != width or width < 2), None)
    if bad is not None:
        raise _malformed(path, bad)
    return headings, rows


def _read_json_lines(path: Path, text: str) -> tuple[list[str], list[list[str]]]:
    """The same, of a file with a JSON object per line; entries that are lists or objects are left out.

    Raises:
        UserError: it is of another form, or lines differ in their entries.
    """
    rows: list[dict[str, str]] = []
    for line in filter(str.strip, text.splitlines()):
        try:
            entries = json.loads(line).items()
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"--labels={path}: {one_line(line)[:80]!r} is no JSON object") from None
        rows.append({key.lower(): str(value).strip() for key, value in entries if isinstance(value, str | int | float)})
    headings = list(rows[0]) if rows else []
    if len(headings) < 2:
        raise UserError(f"--labels={path}: holds no labels")
    odd = next((i for i, row in enumerate(rows, 1) if list(row) != headings), None)
    if odd is not None:
        raise UserError(f"--labels={path}: line {odd} has other entries than {', '.join(headings)}")
    return headings, [list(row.values()) for row in rows]


def _are_headings(rows: list[list[str]]) -> bool:
    """Whether the first row names the columns: it has a usual heading, or no image where the second one has."""
    images = [any(suffix_of(cell) in image_suffixes() for cell in row) for row in rows[:2]]
    usual = {cell.lower() for cell in rows[0]} & {*IMAGE_HEADINGS.split(), *LABEL_HEADINGS.split()}
    return not images[0] and (bool(usual) or len(images) == 1 or images[1])


def _choose_columns(path: Path, headings: list[str], rows: list[list[str]], choice: Choice) -> tuple[int, int]:
    """The columns of names and labels.

    Raises:
        UserError: there is no column of the name that the user gave, or it is unclear which one holds the labels.
    """
    first_is_index = len(headings) > 2 and _is_index(headings[0], [row[0] for row in rows])
    left = list(range(first_is_index, len(headings)))
    name = _column(path, "--image-key", choice.image_key, headings, left, IMAGE_HEADINGS.split())
    if name is None:
        name = next((i for i in left if suffix_of(rows[0][i]) in image_suffixes()), left[0])
    left.remove(name)
    label = _column(path, "--label-key", choice.label_key, headings, left, LABEL_HEADINGS.split())
    if label is not None:
        return name, label
    if len(left) > 1:
        if not any(headings):
            raise _malformed(path, rows[0])
        known = ", ".join(headings[i] for i in left)
        raise UserError(f"--labels={path}: which column? choose --label-key from {known}")
    return name, left[0]


def _column(
    path: Path, option: str, wanted: str | None, headings: list[str], left: list[int], usual: Sequence[str]
) -> int | None:
    """The column that the user wants, or else the one whose heading comes first among the usual ones."""
    words = usual if wanted is None else [wanted.lower()]
    found = next((i for word in words for i in left if headings[i] == word), None)
    if wanted is not None and found is None:
        known = ", ".join(headings[i] for i in left if headings[i])
        raise UserError(f"--labels={path}: {option}={wanted}: no such column (there are {known or 'no headings'})")
    return found


def _is_index(heading: str, cells: Sequence[str]) -> bool:
    """Whether a column, which spreadsheets put first, only counts the rows, from 0 or 1."""
    counts = any(all(cell == str(i + start) for i, cell in enumerate(cells)) for start in (0, 1))
    return heading in INDEX_HEADINGS and counts
