"""What the page can choose from: files of networks, and runs with the averages that their snapshots make."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError, one_line
from training.config.ema import parse_std_list
from training.config.explore import NetworkChoice
from training.families import architecture_of
from training.guides import check_makes_images
from training.snapshot import SnapshotFile, build_for, open_snapshot
from training.snapshot.layout import RUN_SNAPSHOT, newest_of_run
from training.snapshot.profiles import LARGE, expected_errors
from training.snapshot.reconstruction import StoredAverage, inputs_until, list_averages, reconstruct_phema


@dataclass(frozen=True)
class Found:
    """A network that was chosen.

    Args:
        path: where it is.
        name: what a command line calls it.
        command: what makes the file of that name; '' = it is there.
        note: how it came to be, for the page.
    """

    path: str
    name: str
    command: str = ""
    note: str = ""


class Source:
    """A network that the user has named: a file, or the folder of a run.

    Args:
        address, arch: as `path_or_url` and `preset` of `open_snapshot`.
        workdir: where averages are written.

    Raises:
        UserError: it cannot be read, or makes no images.
    """

    def __init__(self, address: str, workdir: Path, arch: str | None = None):
        self.address, self.workdir = address, workdir
        self.saved: dict[tuple[int, str], Path] = {}  # snapshots of a run, by time and the end of their names
        self.averages: list[StoredAverage] = []
        self.obstacle = ""  # why no others can be made of them
        self.refresh()
        self.file: SnapshotFile = open_snapshot(address, preset=arch)
        self.net: Any = build_for(self.file)[0]
        check_makes_images(architecture_of(self.net), address)

    def refresh(self) -> None:
        """Look for the snapshots of a run, of which there may be new ones."""
        if newest_of_run(self.address) is None:
            return
        found = [(RUN_SNAPSHOT.fullmatch(path.name), path) for path in sorted(Path(self.address).iterdir())]
        # Of a time and average, '.safetensors' comes last, and stays.
        self.saved = {(int(match[1]), match[2].removeprefix("-")): path for match, path in found if match is not None}
        try:
            self.averages, self.obstacle = list_averages(Path(self.address)), ""
        except UserError as err:
            self.averages, self.obstacle = [], str(err)

    @property
    def start(self) -> NetworkChoice:
        """What its address stands for on command lines."""
        match = RUN_SNAPSHOT.fullmatch(self.file.path.name) if self.saved else None
        return NetworkChoice() if match is None else NetworkChoice(kimg=int(match[1]), ema=match[2].removeprefix("-"))

    @property
    def other_averages(self) -> set[str]:
        """The ends of the names of a run's snapshots that are no widths."""
        widths = {f"{avg.std:.3f}" for avg in self.averages}
        return {end for _, end in self.saved} - widths

    def describe(self) -> dict[str, Any]:
        """What the page says of it, as plain JSON values."""
        architecture, spec = architecture_of(self.net), self.net.spec
        names = self.file.metadata.get("class_names")
        parameters = sum(p.numel() for p in self.net.parameters())
        about = f"{architecture.family}, {spec.resolution}x{spec.resolution}, {parameters / 1e6:.2f} M parameters"
        return {
            "name": self.address,
            "about": about,
            "denoiser": architecture.is_denoiser,
            "resolution": spec.resolution,
            "pixels": self.file.description.encoder.name == "StandardRGBEncoder",
            "classes": spec.conditioning.num_classes if architecture.is_denoiser else 0,
            "class_names": names,
            "text": spec.conditioning.kind == "tokens",
            "knows_none": spec.conditioning.optional,
            "times": sorted({kimg for kimg, _ in self.saved}),
            "tracked": sorted({round(avg.std, 3) for avg in self.averages}),
            "other_averages": sorted(self.other_averages),
            "obstacle": self.obstacle,
            "start": self.start.to_json(),
        }

    def find(self, choice: NetworkChoice) -> Found:
        """The network of a choice. An average that is not stored is made.

        Raises:
            UserError: there is no such network.
        """
        if not self.saved:
            return Found(self.address, self.address)
        start = self.start
        kimg = start.kimg if choice.kimg is None else choice.kimg
        ema = start.ema if choice.ema is None else choice.ema
        assert kimg is not None and ema is not None
        if (kimg, ema) in self.saved:
            path = str(self.saved[kimg, ema])
            return Found(path, path)
        if ema in self.other_averages:
            there = ", ".join(str(time) for time, end in sorted(self.saved) if end == ema)
            raise UserError(f"{self.address}: no snapshot {ema!r} of {kimg} thousand images (there are {there})")
        return self._average(_width(ema), kimg)

    def _average(self, std: float, kimg: int) -> Found:
        """The average of a width at a time, as reconstruct_phema.py makes it."""
        if not self.averages:
            raise UserError(f"EMA length {std:.3f} cannot be made: {self.obstacle}")
        stored = self.saved.get((kimg, f"{std:.3f}"))
        if stored is not None:
            return Found(str(stored), str(stored))
        used, out_nimg = inputs_until(self.averages, kimg)
        made = next(self.workdir.glob(f"phema-{kimg:07d}-{std:.3f}.*"), None)
        if made is None:
            (made,) = reconstruct_phema(self.averages, self.workdir, "phema", [std], kimg)
        error = float(expected_errors(used, out_nimg, [std])[0])
        command = f"python reconstruct_phema.py --indir={shlex.quote(self.address)} --outstd={std:.3f} --outkimg={kimg}"
        note = f"EMA length {std:.3f} made of {len(used)} snapshots, expected error {error:.1%}"
        note += ": far off" if error > LARGE else ""
        return Found(str(made), str(Path(self.address, made.name)), command, note)


def _width(text: str) -> float:
    """A width as file names have it, with three decimals.

    Raises:
        UserError: it is none.
    """
    try:
        stds = parse_std_list(text)
    except ValueError as err:
        raise UserError(f"EMA length {one_line(err)}") from None
    if len(stds) != 1:
        raise UserError(f"EMA length {one_line(text)!r} is not one number, such as 0.073")
    return float(f"{stds[0]:.3f}")
