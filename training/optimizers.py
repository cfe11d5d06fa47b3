"""From gradients to weights: optimiser, learning rate, and what is done to gradients that are not finite."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from torch_utils import distributed
from torch_utils.gradients import channels_last_views, clip_by_norm_, flat_gradients, replace_nonfinite_


class Optimizer(Protocol):
    """Changes the weights by their gradients.

    `nonfinite` counts the gradient elements that were not finite since the start of the run, int64 [].
    """

    nonfinite: torch.Tensor

    def learning_rate(self, nimg: int) -> float:
        """The learning rate after `nimg` images."""
        ...

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        ...

    def step(self, nimg: int) -> None:
        """Change the weights by the gradients of all processes, `nimg` images having been seen before."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EMA(Protocol):
    """Averages the weights over training, with one or several profiles of relative widths `stds`, None for others."""

    @property
    def stds(self) -> Sequence[float | None]: ...

    def update(self, cur_nimg: int, batch_size: int) -> None:
        """Take in the weights after an optimiser step; `cur_nimg` counts the step's images too."""
        ...

    def get(self) -> list[tuple[torch.nn.Module, str]]:
        """The averaged networks, each with its file name suffix."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AdamOptimizer:
    """Adam, or AdamW. Gradients that are not finite become 0 (EDM2, Appendix B.2).

    Args:
        net: whose parameters are trained. Their gradients become views of one vector, `gradients`.
        learning_rate: as a function of the images seen before a step.
        betas, eps, weight_decay: Adam's constants.
        decoupled: apply the decay to the weights themselves (AdamW).
        max_norm: to which the norm of all gradients together is cut; 0 = not.
        loss_scaling: what the loss is multiplied by before its gradients are computed.

    `nonfinite` counts the gradient elements that were replaced since the start of the run, int64 [], on the device.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        learning_rate: Callable[[int], float],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        max_norm: float = 0.0,
        loss_scaling: float = 1.0,
    ):
        self.rate, self.max_norm, self.loss_scaling = learning_rate, max_norm, loss_scaling
        self.gradients = flat_gradients(net.parameters())
        device = self.gradients.device
        self.fused = device.type != "mps"
        make = torch.optim.AdamW if decoupled else torch.optim.Adam
        views = channels_last_views(net.parameters())
        self.adam = make(views, learning_rate(0), betas, eps, weight_decay, fused=self.fused)
        self.nonfinite = torch.zeros([], dtype=torch.int64, device=device)

    def learning_rate(self, nimg: int) -> float:
        """The learning rate after `nimg` images."""
        return self.rate(nimg)

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        self.gradients.zero_()

    def step(self, nimg: int) -> None:
        """Change the weights by the gradients of all processes, `nimg` images having been seen before."""
        distributed.all_reduce_sum_(self.gradients)
        if self.loss_scaling != 1:
            self.gradients /= self.loss_scaling
        self.nonfinite += replace_nonfinite_(self.gradients)
        if self.max_norm > 0:
            clip_by_norm_(self.gradients, self.max_norm)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(nimg)
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """Adam's state, its moments in the shapes of the weights."""
        return _permuted(self.adam.state_dict(), (0, 3, 1, 2))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(_permuted(state, (0, 2, 3, 1)))
        for group in self.adam.param_groups:
            group["fused"] = self.fused  # a matter of the device, which may have changed


def _permuted(state: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Adam's state with the dimensions of its moments permuted: files hold them as the weights are, [out, in, ...]."""
    moments = {
        idx: {name: x.permute(*order).contiguous() if x.ndim == 4 else x for name, x in values.items()}
        for idx, values in state["state"].items()
    }
    return {**state, "state": moments}
