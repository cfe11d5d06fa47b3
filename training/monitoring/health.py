"""Signs that a training run has gone wrong."""

import math
from pathlib import Path

import torch

from training.monitoring.journal import first_report

DIVERGED = 100  # times the loss at the start of a run


class Divergence:
    """Tells when the loss has left the region that it started in.

    Args:
        outdir: of the run, whose first status report says where the loss started.
    """

    def __init__(self, outdir: Path):
        self.start = first_report(outdir).get("loss")

    def __call__(self, loss: float) -> str | None:
        """What is wrong with a mean loss, in words; None if nothing is.

        Losses may be negative, or begin near 0: what counts is the rise over the first report, in units of its size.
        """
        if self.start is None or not math.isfinite(self.start):
            self.start = loss
        limit = self.start + DIVERGED * max(abs(self.start), 1)
        return f"the loss is {loss:.4g}, after {self.start:.4g} at the start" if loss > limit else None


def weight_beyond_float16(net: torch.nn.Module) -> str | None:
    """Name of a parameter with a value that is infinite in float16, the type of snapshots; None if there is none."""
    limit = torch.finfo(torch.float16).max
    for name, parameter in net.named_parameters():
        if not parameter.detach().abs().amax() <= limit:  # NaN, too
            return name
    return None
