"""Statistics of a training run, kept on the device between reports."""

import math

import torch

from torch_utils import distributed


class Collector:
    """Accumulates count, sum and sum of squares per name, without waiting for the device."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.moments: dict[str, torch.Tensor] = {}

    def report(self, name: str, values: torch.Tensor) -> None:
        """Add any number of values to the statistics of `name`; those that are not finite do not count."""
        x = values.detach().to(self.dtype)
        finite = x.isfinite()
        x = torch.where(finite, x, 0)
        moments = torch.stack([finite.sum().to(self.dtype), x.sum(), x.square().sum()])
        self.moments[name] = self.moments[name] + moments if name in self.moments else moments

    def collect(self) -> dict[str, float]:
        """Mean (`name`) and standard deviation (`name_std`) over all processes since the last call.

        NaN where no value was finite. To be called by all processes; what was collected is cleared.
        """
        result = {}
        for name in sorted(self.moments):
            count, total, squares = distributed.all_reduce_sum_(self.moments[name]).tolist()
            mean = total / count if count > 0 else math.nan
            result[name] = mean
            result[f"{name}_std"] = math.sqrt(max(squares / count - mean**2, 0)) if count > 0 else math.nan
        self.moments.clear()
        return result

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moments of all processes together; to be called by all of them."""
        return {name: distributed.all_reduce_sum_(self.moments[name].clone()) for name in sorted(self.moments)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from the moments of `state_dict`, which the first process holds for all."""
        share = 1 if distributed.get_rank() == 0 else 0
        self.moments = {name: share * moments.to(self.device, self.dtype) for name, moments in state.items()}
