"""Experiment trackers beside TensorBoard: Weights & Biases and trackio (`--tracker`)."""

import importlib
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError, one_line

PROJECT = "openedm2"
ID_NAME = "tracker-id.txt"  # in the directory of a run


class Tracker:
    """Numbers and pictures of a run, for a service. A resumed run continues its record there.

    What fails there never ends a training: after the first failure, one line is shown and nothing more is sent.

    Args:
        name: 'wandb' or 'trackio', which both have `init`, `log`, `Image` and `finish`.
        outdir: directory of the run, whose last part becomes its name.
        config: options of the run, plain JSON values.
        log: shows a line.

    Raises:
        UserError: the package is not installed, or it cannot begin.
    """

    def __init__(self, name: str, outdir: Path, config: dict[str, Any], log: Callable[[str], None]):
        self.name, self.log, self.works = name, log, True
        try:
            self.module = importlib.import_module(name)
        except ImportError as err:
            raise UserError(f"--tracker={name}: it cannot be imported ({one_line(err)}): pip install {name}") from None
        id_path = outdir / ID_NAME
        if not id_path.is_file():
            id_path.write_text(uuid.uuid4().hex[:12] + "\n")
        run_id = id_path.read_text().strip()
        options: dict[str, Any] = {"project": PROJECT, "config": config, "resume": "allow"}
        if name == "wandb":
            options |= {"name": outdir.name, "id": run_id, "dir": str(outdir)}
        else:  # trackio knows runs by their names
            options |= {"name": f"{outdir.name}-{run_id}"}
        try:
            self.module.init(**options)
            if name == "wandb":
                self.module.define_metric("*", step_metric="nimg")
        except Exception as err:  # whatever a service can fail with
            raise UserError(f"--tracker={name} does not work here ({one_line(err)}): leave it out") from None

    def numbers(self, fields: Mapping[str, float]) -> None:
        """Record numbers; `fields["nimg"]` says when. Those that are not finite, and the time, are left out."""
        values = {name: value for name, value in fields.items() if math.isfinite(value) and name != "time"}
        self._attempt(lambda: self.module.log(values))

    def picture(self, name: str, path: Path, nimg: int) -> None:
        """Record a picture file."""
        self._attempt(lambda: self.module.log({name: self.module.Image(str(path)), "nimg": nimg}))

    def close(self) -> None:
        """End the record, for now."""
        self._attempt(self.module.finish)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.works:
            try:
                action()
            except Exception as err:
                self.works = False
                self.log(f"Warning: --tracker={self.name} failed ({one_line(err)}); the training goes on without it")
