"""The models that are compared in the toy example, and whether they go together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dnnlib.errors import UserError
from training.config.metrics import TOY_CLASSES
from training.networks.toy import ToyModel


class Loaded(Protocol):
    """A network file, loaded: a `training.snapshot.Snapshot`."""

    @property
    def net(self) -> torch.nn.Module: ...

    @property
    def metadata(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Models:
    """Models to compare.

    Args:
        net: the main model.
        gnet: its guide for autoguidance; None = no autoguidance.
        cfg_net: its guide for classifier-free guidance.
        cls: the class that `net` was trained on.
        names: of their files, by the names of the options.
    """

    net: ToyModel
    gnet: ToyModel | None
    cfg_net: ToyModel
    cls: str
    names: dict[str, str | None]


def load_models(
    load: Callable[[str], Loaded], net: str, gnet: str | None, cfg_net: str, cls: str | None = None
) -> Models:
    """The models in files, as the options --net, --gnet and --cfg-net name them.

    Args:
        load: path or URL -> contents.
        net, gnet, cfg_net: the files; `gnet` may be None.
        cls: class that `net` was trained on; None = as its file says, else 'A'.

    Raises:
        UserError: a file is missing, damaged, or holds another kind of network; `cls` is not that of `net`; or a guide
            is of no use to it.
    """
    names = {"net": Path(net).name, "gnet": gnet and Path(gnet).name, "cfg_net": Path(cfg_net).name}
    main, trained_on = _load("--net", net, load)
    guide = _load("--gnet", gnet, load)[0] if gnet is not None else None
    if guide is not None and _are_equal(main, guide):
        raise UserError(f"--gnet={gnet} is the same model as --net={net}: give a worse one, or no --gnet")
    cfg_guide, cfg_trained_on = _load("--cfg-net", cfg_net, load)
    if cls is not None and trained_on in TOY_CLASSES and cls != trained_on:
        raise UserError(f"--cls={cls}, but {net} was trained on {trained_on}: leave out --cls, or give another --net")
    if trained_on in ("A", "B") and cfg_trained_on == trained_on:
        raise UserError(
            f"--cfg-net={cfg_net} was trained on {trained_on} alone, like --net: give a model of both classes, AB"
        )
    cls = cls or (trained_on if trained_on in TOY_CLASSES else "A")
    return Models(main, guide, cfg_guide, cls, names)


def _load(option: str, path: str, load: Callable[[str], Loaded]) -> tuple[ToyModel, str | None]:
    """The model in a file, and the class that it was trained on, if known."""
    loaded = load(path)
    net = loaded.net
    if not isinstance(net, ToyModel):
        raise UserError(f"{option}={path} holds a {type(net).__name__}, not a model of the toy example")
    if net.init_kwargs["in_dim"] != 2:
        raise UserError(f"{option}={path} is a model of {net.init_kwargs['in_dim']} dimensions, not 2")
    return net, (loaded.metadata.get("config") or {}).get("cls")


def _are_equal(a: ToyModel, b: ToyModel) -> bool:
    parameters = zip(a.parameters(), b.parameters(), strict=True)
    return a.init_kwargs == b.init_kwargs and all((p == q).all() for p, q in parameters)
