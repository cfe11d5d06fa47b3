"""Memory of a training run, by a rehearsal: a step is gone through with tensors that have sizes and no values."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_utils.gradients import flat_gradients, use_channels_last
from training.conditioning import DataSpec
from training.config.training import BY_IMAGE, TrainConfig
from training.dataset.images import ImageFolderDataset
from training.encoders import data_spec, encoder_for
from training.families import trained_by
from training.families.architecture import no_context
from training.holding import sharing_of
from training.monitoring.states import MOMENTS, stored_copies
from training.monitoring.states import averages as averages_of
from training.networks.dropout import ImageMasks
from training.networks.nvae_layers import DataInitConv2d
from training.samplers.noise import StackedRandomGenerator


def spec_of(config: TrainConfig, dataset: ImageFolderDataset) -> DataSpec:
    """What a network sees of a dataset."""
    return data_spec(dataset, encoder_for(dataset, config.data.encoder, config.data.trust_encoder))


@dataclass(frozen=True)
class Kept:
    """Bytes that a process holds throughout a run, on its device.

    Args:
        weights: parameters and buffers; where weights are shared out, also what acts in place of EDM2's.
        gradients: of these.
        moments: of Adam or Adamax.
        averages: of the weights.
        state: of a training state, which is copied to the memory of the host, and from there to disk; where weights are
            shared out, it is written as it is.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    state: int

    @property
    def total(self) -> int:
        """All but the copy of a state."""
        return self.weights + self.gradients + self.moments + self.averages


class Rehearsal:
    """A network in training whose tensors have sizes and no values, on any machine.

    Every operation of a forward and backward pass is gone through, and what is allocated and freed on the way counted.
    On processors the operations are theirs. Of GPUs, they are what networks do where there is no processor, with fused
    attention; workspaces of their libraries are not counted. NVAE is gone through as on a processor in both cases, as
    autocast knows no tensors without a device.

    Where weights are shared out (`config.run.shard`), what is kept follows from the sizes of their pieces, and the room
    for gathered weights and their gradients, four times the largest block, is added to that of a step.

    Args:
        config: what is trained.
        spec: what its data look like.
        device: 'cpu', or the name of another kind of device.
    """

    def __init__(self, config: TrainConfig, spec: DataSpec, device: str):
        self.config, self.architecture = config, trained_by(config)
        as_cpu = device == "cpu" or not self.architecture.is_denoiser
        self._as_bf16 = as_cpu and device != "cpu"  # a processor has no fp16, which takes as much
        self._memory, self._fake = _Memory(), FakeTensorMode(allow_non_fake_inputs=True) if as_cpu else None
        self._device = "cpu" if as_cpu else "meta"
        with torch.device("meta"):  # where nothing is drawn
            net = self.architecture.build(config.network, spec).train()
        for module in net.modules():
            if isinstance(module, DataInitConv2d):
                del module.init_done
                module.init_done = True  # type: ignore[assignment]  # what depends on data is done
        with self._rehearsing():
            assert self.architecture.ema is not None and self.architecture.objective is not None
            self.net = net.to_empty(device=self._device)
            use_channels_last(self.net)
            weights = self._memory.now
            self._ema = self.architecture.ema(self.net, config)
            averages = self._memory.now - weights
            self._objective = self.architecture.objective(self.net, config)
            self._gradients = flat_gradients(self.net.parameters())
        trained = self._gradients.nbytes
        self.kept = Kept(weights, trained, MOMENTS * trained, averages, trained * stored_copies(config))
        self._step, self._gathered = self.architecture.step, 0  # bytes
        if config.run.shard > 1:
            self._share_out(config.run.shard)

    def _share_out(self, size: int) -> None:
        """From now on, weights are shared out over groups of `size` processes.

        Raises:
            UserError: those of the family are not.
        """
        sharing, core = sharing_of(self.architecture, size), self.architecture.core(self.net)
        sizes = [sum(p.nbytes for p in block.parameters()) for block in sharing.blocks_of(core)]
        outside = sum(p.nbytes for p in core.parameters()) - sum(sizes)
        self.kept = self.kept_in_pieces(size)
        acting = self.kept.gradients - self.kept.moments // MOMENTS
        self._step, self._gathered = no_context, 4 * max(sizes) + 2 * outside + acting
        sharing.hold(self.net)

    def kept_in_pieces(self, size: int) -> Kept:
        """What is kept where weights are shared out over groups of `size` processes."""
        sharing, core = sharing_of(self.architecture, size), self.architecture.core(self.net)
        shared = {p for p in core.parameters() if p.ndim > 0}
        pieces = {
            name: 4 * (-(-len(p) // size) * p[0].numel() if p in shared else p.numel())
            for name, p in self.net.named_parameters()
        }
        total, acting = sum(pieces.values()), sum(pieces[name] for name in sharing.acting(self.net))
        moments, copies = MOMENTS * total, averages_of(self.config)
        return Kept(total + acting, total + acting, moments, copies * total, stored_copies(self.config) * total)

    @property
    def can_checkpoint_activations(self) -> bool:
        """Whether the network can compute activations twice instead of keeping them."""
        return hasattr(self.architecture.core(self.net), "checkpoint_activations")

    def step(self, batch: int, precision: str, checkpoint_activations: bool) -> int:
        """The most bytes that a round of `batch` images holds at a time, beside what is kept.

        Args:
            precision: 'fp32', 'bf16' or 'fp16', what the network computes in.
            checkpoint_activations: whether activations are computed twice instead of being kept.
        """
        net, memory, spec = self.net, self._memory, self.net.spec
        net.precision = "bf16" if self._as_bf16 and precision == "fp16" else precision
        if self.can_checkpoint_activations:
            core: Any = self.architecture.core(net)
            core.checkpoint_activations = checkpoint_activations
        with self._rehearsing():
            start = memory.peak = memory.now
            images = torch.empty([batch, *spec.shape], device=self._device)
            cond = torch.empty([batch, *spec.conditioning.shape], device=self._device)
            with self._step(net):
                if self.config.run.dropout_masks == BY_IMAGE:
                    ImageMasks(net)(np.arange(batch), torch.device(self._device))
                loss = self._objective(net, images, cond, rnd=_Draws(self._device), nimg=0)
                loss.sum().backward()
        return memory.peak - start + self._gathered

    @contextmanager
    def _rehearsing(self) -> Iterator[None]:
        with self._fake or _fused_attention(), self._memory, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copies look at it
            yield


class _Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, as long as anything holds them: `now`, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a number, where there are none: any will do
        out = func(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return

        def freed(_ref: weakref.ref) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Inside, attention is what GPUs compute, also where tensors are on no device: without its weights in memory."""
    usual = F.scaled_dot_product_attention

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    F.scaled_dot_product_attention = fused  # a mode of torch would end where activations are computed again
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


class _Draws(StackedRandomGenerator):
    """Random numbers without values."""

    def __init__(self, device: str):
        self.device = device

    def _stack(self, draw: Any, size: Any, **kwargs: Any) -> torch.Tensor:
        return draw(list(size), **{"device": self.device, **kwargs})
