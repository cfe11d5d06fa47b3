"""What a process holds of the network that it trains: all of it, or pieces of its weights (`--shard`)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.errors import UserError
from torch_utils import distributed
from torch_utils.checkpoint import load_state
from torch_utils.gradients import use_channels_last
from torch_utils.sharded_state import load_pieces, save_pieces, take_pieces
from torch_utils.sharding import Pieces, check_sharding
from training.families.architecture import Architecture, Sharing
from training.monitoring.states import StateWriter, bytes_of
from training.optimizers import EMA, Optimizer


def sharing_of(architecture: Architecture, size: int) -> Sharing:
    """How weights of an architecture are shared out over groups of `size` processes.

    Raises:
        UserError: they are not.
    """
    if architecture.sharing is None:
        raise UserError(f"--shard={size}: networks of {architecture.family} are not shared out: leave it out")
    return architecture.sharing


class Whole:
    """All of a network.

    Args:
        architecture: of the network.
        net: computes, on the device of this process.

    `held` is what optimisers change, averages follow and states hold: here, `net` itself.
    """

    def __init__(self, architecture: Architecture, net: Any):
        self.architecture, self.net, self.held = architecture, net, net
        if next(net.parameters()).device.type != "mps":
            use_channels_last(net)

    def compile(self) -> None:
        """Let torch.compile make the kernels."""
        self.architecture.core(self.net).compile(dynamic=False)

    def attach(self, optimizer: Optimizer) -> None:
        """Have the gradients of the network arrive at an optimiser of `held`."""

    def averages(self, ema: EMA) -> EMA:
        """Averages of whole networks, for averages of `held`."""
        return ema

    def step(self) -> AbstractContextManager:
        """Entered around the forward and backward passes of a training step."""
        return self.architecture.step(self.net)

    def take_(self, fill: Callable[[Any], list[str]], _build: Callable[[], Any]) -> list[str]:
        """Have weights filled into the network by a function, and return what it does.

        Args:
            fill: net -> lines.
            _build: () -> a network of the same kind.
        """
        return fill(self.net)

    def everywhere(self) -> list[torch.Tensor]:
        """The parameters that are the same on all processes."""
        return list(self.net.parameters())

    def check_same(self, what: str) -> None:
        """Check that processes hold the same weights, as far as they should; to be called by all of them.

        Raises:
            RunError: they do not.
        """
        distributed.check_same(self.everywhere(), what)

    def save(self, states: StateWriter, nimg: int, state: dict[str, Any]) -> None:
        """Write a training state, in which the network is `held`; to be called by all processes."""
        if distributed.get_rank() == 0:
            states.save(nimg, state)

    def load(self, path: Path) -> dict[str, Any]:
        """A training state, in which the network is to be `held`, whatever wrote it.

        Raises:
            Exception: it is damaged.
        """
        return load_pieces(path, None) if path.is_dir() else load_state(path)


class Shared(Whole):
    """Pieces of a network whose weights are shared out over groups of processes.

    Args:
        architecture, net: as for `Whole`; the network gathers its weights where it computes.
        size: processes of a group.

    Raises:
        UserError: the family's networks are not shared out, or the processes form no such groups.
    """

    def __init__(self, architecture: Architecture, net: Any, size: int):
        self.architecture, self.net, self.sharing = architecture, net, sharing_of(architecture, size)
        check_sharding(size)
        core = architecture.core(net)
        self.blocks = self.sharing.blocks_of(core)
        self.pieces = Pieces(net, core, self.blocks, size, self.sharing.acting(net))
        self.held: Any = self.pieces.held
        self.names = {name for name, _ in self.held.named_parameters()}
        self.sharing.hold(net)

    def compile(self) -> None:
        """Let torch.compile make the kernels of each block, between which weights are gathered."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def attach(self, optimizer: Any) -> None:
        self.pieces.attach(optimizer)
        self.optimizer_names: list[str] = optimizer.names

    def averages(self, ema: EMA) -> EMA:
        return GatheredEMA(ema, self.pieces)

    @contextmanager
    def step(self) -> Iterator[None]:
        with self.architecture.step(self.held):
            acting = {name: weight for name, weight in self.sharing.acting(self.held).items() if weight is not None}
            with self.pieces.computing(acting):
                yield

    def take_(self, fill: Callable[[Any], list[str]], build: Callable[[], Any]) -> list[str]:
        whole = build()
        lines = fill(whole)
        self.pieces.take_(whole)
        return lines

    def everywhere(self) -> list[torch.Tensor]:
        return self.pieces.whole_parameters()

    def check_same(self, what: str) -> None:
        super().check_same(what)
        distributed.check_same(list(self.held.parameters()), what, places=self.pieces.size)

    def save(self, states: StateWriter, nimg: int, state: dict[str, Any]) -> None:
        size = self.pieces.size * bytes_of(state)
        states.save_together(nimg, size, lambda path: save_pieces(path, state, self.pieces, self.parameter_at))

    def load(self, path: Path) -> dict[str, Any]:
        if path.is_dir():
            return load_pieces(path, self.pieces)
        return take_pieces(load_state(path), self.pieces, self.parameter_at)

    def parameter_at(self, place: tuple) -> str | None:
        """The parameter that a tensor of a training state is shaped like, by the keys that lead there; None = none."""
        if place[:2] == ("optimizer", "state"):
            return None if place[-1] == "step" else self.optimizer_names[place[2]]
        return place[-1] if place[-1] in self.names else None


class GatheredEMA:
    """Averages of pieces, which are put together where whole networks are asked for; then by all processes."""

    def __init__(self, ema: EMA, pieces: Pieces):
        self.ema, self.pieces = ema, pieces

    @property
    def stds(self) -> Sequence[float | None]:
        return self.ema.stds

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """As of the averages."""
        self.ema.update(cur_nimg, batch_size)

    def get(self) -> list[tuple[nn.Module, str]]:
        """The averaged networks, whole, each with its file name suffix."""
        return [(self.pieces.gathered(held), suffix) for held, suffix in self.ema.get()]

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state)
