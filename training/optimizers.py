"""From gradients to weights: optimiser, learning rate, and what is done to gradients that are not finite."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from torch_utils import distributed
from torch_utils.gradients import channels_last_views, flat_gradients, replace_nonfinite_
from training.config.edm2 import EDM2Optimizer
from training.lr import learning_rate_schedule


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
    """Averages the weights over training, with one or several profiles of relative widths `stds`."""

    stds: list[float]

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
    """Adam with EDM2's learning rate. Gradients that are not finite become 0 (EDM2, Appendix B.2).

    Args:
        net: whose parameters are trained. Their gradients become views of one vector, `gradients`.
        config: learning rate, its decay and ramp-up, and Adam's constants.
        batch: images per step, over all processes.
        loss_scaling: what the loss is multiplied by before its gradients are computed.

    `nonfinite` counts the gradient elements that were replaced since the start of the run, int64 [], on the device.
    """

    def __init__(self, net: torch.nn.Module, config: EDM2Optimizer, batch: int, loss_scaling: float = 1.0):
        self.config, self.batch, self.loss_scaling = config, batch, loss_scaling
        self.gradients = flat_gradients(net.parameters())
        device = self.gradients.device
        self.fused = device.type != "mps"
        views = channels_last_views(net.parameters())
        betas = (config.betas[0], config.betas[1])
        self.adam = torch.optim.Adam(views, lr=config.lr, betas=betas, eps=config.eps, fused=self.fused)
        self.nonfinite = torch.zeros([], dtype=torch.int64, device=device)

    def learning_rate(self, nimg: int) -> float:
        """The learning rate after `nimg` images."""
        config = self.config
        return learning_rate_schedule(nimg, self.batch, config.lr, config.decay, config.rampup_Mimg)

    def zero_gradients(self) -> None:
        """Forget the gradients of the step before."""
        self.gradients.zero_()

    def step(self, nimg: int) -> None:
        """Change the weights by the gradients of all processes, `nimg` images having been seen before."""
        distributed.all_reduce_sum_(self.gradients)
        if self.loss_scaling != 1:
            self.gradients /= self.loss_scaling
        self.nonfinite += replace_nonfinite_(self.gradients)
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
