"""Networks whose weights are shared out over processes, by PyTorch's FSDP2: each holds some rows of every weight.

Zhao et al. 2023, "PyTorch FSDP" (arXiv 2304.11277). The weights of a block are gathered where it is computed, and its
gradients summed and shared out again. Where there are several groups of processes, each has all weights, and
gradients are summed over groups, too (HSDP).
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dnnlib.errors import UserError
from torch_utils import distributed
from torch_utils.gradients import Totals, count_nonfinite, norm_of

NEEDED = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms")  # of FSDPModule


def check_sharding(size: int) -> None:
    """Check that processes form groups of `size`, and that this PyTorch can share out weights.

    Raises:
        UserError: it is not so.
    """
    # Imported here, as by all that does: it takes a second, which other runs need not wait for.
    from torch.distributed.fsdp import FSDPModule, fully_shard

    processes = distributed.get_world_size()
    if processes % size:
        raise UserError(
            f"--shard={size}: the number of processes, {processes}, is no multiple of it: start with torchrun "
            f"--nproc_per_node={size}, or so many on each of several machines"
        )
    has_all = all(hasattr(FSDPModule, name) for name in NEEDED)
    if not has_all or "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"--shard needs a newer PyTorch than {torch.__version__}: 2.13 is known to work")


class Pieces:
    """What this process holds of a network whose weights are shared out over a group of processes.

    `net` is changed: it gathers the weights of a block when it computes with it, and sums and shares out their
    gradients. `held` is a copy of it whose parameters are this process's rows of the weights [ceil(out / size), ...],
    or fewer, and whose buffers are those of `net`. It computes nothing, but optimisers and averages, which work
    element by element, take it for a network. Parameters without dimensions and those outside of the core are whole in
    both.

    Args:
        net: on the device of this process, the same on all.
        core: the part of it whose weights are shared out.
        blocks: modules of the core that are gathered one at a time; the rest of it is, together.
        size: processes of a group.
        apart: names of parameters in whose place something else acts, see `computing`.
    """

    def __init__(self, net: nn.Module, core: nn.Module, blocks: list[nn.Module], size: int, apart: Collection[str]):
        for p in net.parameters():
            p.data = p.data.contiguous()  # FSDP2 takes no other
        copies: dict[int, Any] = {id(buffer): buffer for buffer in net.buffers()}
        for p in net.parameters():
            copies[id(p)] = nn.Parameter(torch.empty(0, device=p.device), requires_grad=p.requires_grad)
        self.net, self.size, self.apart = net, size, apart
        self.held = copy.deepcopy(net, copies)
        _share_out(core, blocks, size)
        self.rank = distributed.get_rank() % size
        for p, piece in zip(net.parameters(), self.held.parameters(), strict=True):
            piece.data = local(p)
        for name, piece in self._pieces().items():
            if name in apart:
                piece.data = piece.data.clone()

    def _pieces(self) -> dict[str, nn.Parameter]:
        return dict(self.held.named_parameters())

    def is_shared_out(self, name: str) -> bool:
        """Whether processes hold different rows of a parameter."""
        return _is_dtensor(self.net.get_parameter(name))

    def like(self, name: str, piece: torch.Tensor) -> torch.Tensor:
        """A piece of something shaped like a parameter, such as its gradient, as a DTensor; or as it is, if whole."""
        p: Any = self.net.get_parameter(name)
        if not _is_dtensor(p):
            return piece
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())

    def rows(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's piece of something that is shaped like a parameter, a view."""
        if not self.is_shared_out(name):
            return whole
        count = -(-len(whole) // self.size)
        return whole[self.rank * count : (self.rank + 1) * count]

    @torch.no_grad()
    def take_(self, whole: nn.Module) -> None:
        """Take over the parameters of a whole network of the same kind, on any device."""
        pieces = self._pieces()
        for name, p in whole.named_parameters():
            pieces[name].copy_(self.rows(name, p))

    @torch.no_grad()
    def gathered(self, held: nn.Module) -> nn.Module:
        """The whole network of pieces like `held`; to be called by all processes."""
        copies: dict[int, Any] = {}
        for name, piece in held.named_parameters():
            whole: Any = self.like(name, piece.detach())
            copies[id(piece)] = nn.Parameter(whole.full_tensor() if _is_dtensor(whole) else whole.clone(), False)
        return copy.deepcopy(held, copies)

    def whole_parameters(self) -> list[torch.Tensor]:
        """Parameters that each process has all of."""
        return [p for name, p in self._pieces().items() if not self.is_shared_out(name)]

    def attach(self, optimizer: Any) -> None:
        """Have the gradients of the network arrive in those of an optimiser of `held`, and it know what is whole."""
        optimizer.totals = TotalsOfPieces(self, optimizer.gradients)
        for name, piece in self._pieces().items():
            if piece.grad is not None and name not in self.apart:
                self.net.get_parameter(name).grad = self.like(name, piece.grad)

    @contextmanager
    def computing(self, acting: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the network computes; backward passes leave the gradients of what acts in its `.grad`.

        Args:
            acting: what acts in place of the parameters of `held` that are `apart`, by name.
        """
        with torch.no_grad():
            for name, piece in acting.items():
                p = self.net.get_parameter(name)
                local(p).copy_(piece)
                if piece.requires_grad:
                    piece.grad = torch.zeros_like(piece)
                    p.grad = self.like(name, piece.grad)
        with distributed.naming_lost_processes():
            yield


class TotalsOfPieces(Totals):
    """Figures of gradients of which each process has a piece: those of weights that are shared out, summed already.

    Args:
        pieces: the network.
        gradients: the vector of the gradients of `pieces.held`, in the order of its trained parameters.
    """

    def __init__(self, pieces: Pieces, gradients: torch.Tensor):
        trained = {name: p for name, p in pieces.held.named_parameters() if p.requires_grad}
        parts = torch.arange(len(gradients), device=gradients.device).split([p.numel() for p in trained.values()])
        whole = [part for name, part in zip(trained, parts, strict=True) if not pieces.is_shared_out(name)]
        self.whole = torch.cat([gradients.new_zeros(0, dtype=torch.int64), *whole])  # indices of what all have
        shared: Any = next(p for p in pieces.net.parameters() if _is_dtensor(p))
        self.group = shared.device_mesh.get_group(shared.device_mesh.ndim - 1)

    def sum_(self, gradients: torch.Tensor) -> None:
        whole = gradients[self.whole]
        distributed.sum_gradients_(whole)
        gradients[self.whole] = whole

    def norm(self, gradients: torch.Tensor) -> torch.Tensor:
        return self._total(lambda values: norm_of(values).square(), gradients).sqrt()

    def count_nonfinite(self, gradients: torch.Tensor) -> torch.Tensor:
        return self._total(count_nonfinite, gradients)

    def _total(self, measure: Callable[[torch.Tensor], torch.Tensor], gradients: torch.Tensor) -> torch.Tensor:
        """The sum of what `measure` finds in all pieces, counting once what all processes have."""
        whole = measure(gradients[self.whole])
        return distributed.all_reduce_sum_(measure(gradients) - whole, self.group) + whole


def _share_out(core: nn.Module, blocks: list[nn.Module], size: int) -> None:
    """Turn modules into such as gather their weights when they are called."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(core.parameters()).device
    groups = distributed.get_world_size() // size
    shape, names = ((size,), ("rows",)) if groups == 1 else ((groups, size), ("groups", "rows"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    numbers = {p for p in core.parameters() if p.ndim == 0}
    for module in [*blocks, core]:
        shared: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
        shared.set_gradient_divide_factor(1.0)  # gradients are sums here, and no means
        shared.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _is_dtensor(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@torch.no_grad()
def local(tensor: Any) -> torch.Tensor:
    """The piece of a DTensor that this process holds, in the same memory; of another tensor, it itself, detached."""
    return tensor.detach().to_local() if _is_dtensor(tensor) else tensor.detach()
