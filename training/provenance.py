"""What made generated images: generation.json beside them, and the same in each PNG file."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import nn

from dnnlib.cli import parse_int_list
from dnnlib.download import is_url
from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from training.config.data import RECORD_NAME

TEXT_KEY = "openedm2"  # of PNG files
# What may differ between images that are made in the same way.
INCIDENTAL = ("seeds", "seed", "class", "class_name", "net", "gnet", "code_version", "earlier")


def format_seeds(seeds: Iterable[int]) -> str:
    """Seeds such as '0-99,200', as `parse_int_list` reads them; '' = none."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def name_of(function: Any) -> str:
    """What a function, or the class of a network, is called."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: text for all that is no number, text, bool or None."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return name_of(value) if callable(value) else str(value)


def weights_sha256(net: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def png_text(facts: Mapping[str, Any], **of_image: Any) -> dict[str, str]:
    """The text of a PNG file. Names of local files lose their folders, which are nobody else's business.

    Args:
        facts: what made the images, as plain JSON values.
        of_image: what is known of this one.
    """
    public = {key: value for key, value in facts.items() if key != "seeds"}
    for key in ("net", "gnet"):
        if key in public and not is_url(public[key]):
            public[key] = os.path.basename(os.path.normpath(public[key]))
    kwargs = public.get("encoder", {}).get("kwargs", {})
    if os.path.isabs(kwargs.get("vae_name", "")):
        kwargs = {**kwargs, "vae_name": os.path.basename(kwargs["vae_name"])}
        public["encoder"] = {**public["encoder"], "kwargs": kwargs}
    return {TEXT_KEY: json.dumps({**public, **of_image})}


def read_png_text(path: Path) -> dict[str, Any] | None:
    """What a PNG file says of what made it; None = nothing that is understood."""
    try:
        with PIL.Image.open(path) as image:
            facts = json.loads(image.info[TEXT_KEY])
    except Exception:  # a file that is damaged, or says nothing, can fail in any way
        return None
    return facts if isinstance(facts, dict) else None


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first fact in which two makers of images differ, for a message; '' = they make the same."""
    ours, theirs = _essence(ours), _essence(theirs)
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            return f"{key} {_short(theirs.get(key))} instead of {_short(ours.get(key))}"
    return ""


def _essence(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts on which images depend, where each kind has one form."""
    essence = json.loads(json.dumps({key: value for key, value in facts.items() if key not in INCIDENTAL}))
    sampler = essence.pop("sampler", {})
    encoder = essence.pop("encoder", {})
    kwargs = encoder.pop("kwargs", {}) if isinstance(encoder, dict) else {}
    if "vae_sha256" in kwargs:
        del kwargs["vae_name"]  # wherever it is
    return {**essence, **_prefixed("sampler", sampler), **_prefixed("encoder", {**encoder, **kwargs})}


def _prefixed(name: str, values: Any) -> dict[str, Any]:
    return {f"{name} {key}": value for key, value in values.items()} if isinstance(values, dict) else {name: values}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return one_line(text if len(text) <= 24 else f"{text[:12]}...")


class ImageRecord:
    """The record of what made the images of a folder.

    `generation.json` holds the facts of the newest images with their seeds, and under `earlier` those of others that
    are still there.

    Args:
        outdir: the folder.
        facts: what makes images now, as plain JSON values.

    Raises:
        UserError: there is a record that cannot be read.
    """

    def __init__(self, outdir: Path, facts: Mapping[str, Any]):
        self.folder, self.path = outdir, outdir / RECORD_NAME
        self.facts = {key: value for key, value in facts.items() if key != "seeds"}
        self.seeds: set[int] = set()
        self.others: list[tuple[dict[str, Any], set[int]]] = []
        self.sheets: set[str] = set()  # contact sheets in the folder, which are none of its images
        for entry, seeds in self._read():
            if difference(self.facts, entry):
                self.others.append((entry, seeds))
            else:
                self.seeds |= seeds

    def _read(self) -> list[tuple[dict[str, Any], set[int]]]:
        if not self.path.exists():
            return []
        try:
            newest = json.loads(self.path.read_text())
            self.sheets |= set(newest.pop("sheets", []))
            entries = [newest, *newest.pop("earlier", [])]
            return [(entry, set(parse_int_list(text)) if (text := entry.pop("seeds")) else set()) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise UserError(
                f"{self.path}: not a record of generated images ({one_line(repr(err))[:100]}): delete it, or choose "
                "another --outdir"
            ) from None

    def leave_out(self, sheet: Path) -> None:
        """Say of a contact sheet, if it is in the folder, that it is none of its images.

        Raises:
            UserError: it has the name of an image.
        """
        folder = self.path.parent.resolve()
        if sheet.resolve().is_relative_to(folder):
            if re.fullmatch("[0-9]{6,}", sheet.stem):
                raise UserError(f"--grid={sheet}: is the name of an image of --outdir: choose another one")
            self.sheets.add(sheet.resolve().relative_to(folder).as_posix())

    def check(self, files: Mapping[int, Path]) -> int:
        """How many of these images, by seed, do not say what made them; those that do are in the record from now on.

        Raises:
            UserError: one was made by something else.
        """
        unknown = 0
        for seed, file in files.items():
            if seed in self.seeds:
                continue
            theirs = self._maker(seed, file)
            if theirs is None:
                unknown += 1
            elif found := difference(self.facts, theirs):
                raise UserError(
                    f"--skip-existing: {file} was made by something else ({found}): choose another --outdir, or make "
                    "all images again without --skip-existing"
                )
            else:
                self.seeds.add(seed)
        return unknown

    def _maker(self, seed: int, file: Path) -> dict[str, Any] | None:
        """What made an image that is not among `seeds`; None = it is not known."""
        return next((entry for entry, seeds in self.others if seed in seeds), None) or read_png_text(file)

    def note_of_others(self, made: Iterable[Path], suffix: str) -> str:
        """A line about images in the folder that something else has made, beside the files made now; '' = none.

        Who measures the folder measures them, too.
        """
        made, folder, found = set(made), self.folder, []
        for file in (*folder.glob(f"*{suffix}"), *folder.glob(f"*/*{suffix}")):
            if file in made or not re.fullmatch("[0-9]{6,}", file.stem) or (seed := int(file.stem)) in self.seeds:
                continue
            theirs = self._maker(seed, file)
            if theirs is None or difference(self.facts, theirs):
                found.append(file)
        if not found:
            return ""
        name, count = min(found).relative_to(folder), f"{len(found)} image{'s' if len(found) > 1 else ''}"
        return f"Note: {folder} also holds {count} that this does not make, such as {name}"

    @contextmanager
    def of(self, seeds: Sequence[int]) -> Iterator[None]:
        """Inside, the images of these seeds are made: the record is there before it, and complete after it.

        While they are made, it does not say that images whose place they take were made by something else.

        Raises:
            OSError: it could not be written.
        """
        made = set(seeds)
        self.others = [(entry, rest) for entry, seeds in self.others if (rest := seeds - made)]
        self._write()
        yield
        self.seeds |= made
        self._write()

    def _write(self) -> None:
        contents: dict[str, Any] = {**self.facts, "seeds": format_seeds(self.seeds)}
        if self.others:
            contents["earlier"] = [{**entry, "seeds": format_seeds(seeds)} for entry, seeds in self.others]
        if self.sheets:
            contents["sheets"] = sorted(self.sheets)
        text = json.dumps(contents, indent=2) + "\n"
        if not (self.path.is_file() and self.path.read_text() == text):
            with atomic_write(self.path, "w") as f:
                f.write(text)
