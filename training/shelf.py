"""Networks that stay in memory for callers that use several of them in turn."""

import os
from collections import OrderedDict
from pathlib import Path

import torch

from training.config.generation import KEPT_NETWORKS
from training.guides import load_image_network
from training.snapshot import Snapshot


class Shelf:
    """Loads networks, and keeps those that were used last. It stands for `load_image_network` (see `generation.load`).

    Args:
        workdir: files below it are deleted when their networks are no longer kept; None = no files are.
        limit: bytes of networks that are kept.
        at_least: how many are kept in any case: as many as are used at a time.
    """

    def __init__(self, workdir: Path | None = None, limit: int = KEPT_NETWORKS, at_least: int = 2):
        self.workdir, self.limit, self.at_least = workdir, limit, at_least
        self.kept: OrderedDict[tuple[str, int], Snapshot] = OrderedDict()

    def __call__(
        self, path_or_url: str | Path, device: torch.device | str = "cpu", arch: str | None = None
    ) -> Snapshot:
        """As `load_image_network`; a network is read again when its file has changed."""
        path = os.fspath(path_or_url)
        key = _key(path)
        if key not in self.kept:
            self.kept[key] = load_image_network(path, device, arch)
        self.kept.move_to_end(key)
        while len(self.kept) > self.at_least and sum(map(_size, self.kept.values())) > self.limit:
            (old, _), _ = self.kept.popitem(last=False)
            if self.workdir is not None and Path(old).is_relative_to(self.workdir):
                Path(old).unlink(missing_ok=True)
        return self.kept[key]

    def hold(self, path: str) -> None:
        """Have a network, if it is kept, be dropped last.

        To be called before several are loaded of which some are kept: the first would take the place of another one,
        whose file may be deleted.
        """
        if _key(path) in self.kept:
            self.kept.move_to_end(_key(path))


def _key(path: str) -> tuple[str, int]:
    return path, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0


def _size(snapshot: Snapshot) -> int:
    """Bytes of a network."""
    return sum(tensor.numel() * tensor.element_size() for tensor in snapshot.net.state_dict().values())
