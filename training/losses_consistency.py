"""The objective of consistency tuning: what turns a denoiser into a model that jumps to the end of its paths."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.config.consistency import ConsistencyTraining
from training.denoiser import noise_range
from training.losses import Stateless, WithoutSomeConditions
from training.schedules import wide


class ConsistencyLoss(Stateless):
    """ "Easy consistency tuning" (Geng et al. 2024, "Consistency Models Made Easy", arXiv 2406.14548, Section 3).

    A consistency model f(x, t) gives the same image all along a path of the probability flow: its end. Tuning begins
    with a denoiser f = D with EDM's preconditioning, for which f(x, 0) = x holds as it is, and lets what it makes of an
    image at a noise level t agree with what it makes of the same image, under the same noise n and the same dropout
    mask, at a level r < t:

        w(t) d(f(y + t n, t), f(y + r n, r)),    w = 1 / (t - r),    d(a, b) = sqrt(|a - b|^2 + c^2) - c

    There is no gradient through the second of them, the target; where r = 0 it is the clean image y, as in denoising.
    Over stages a = 1, 2, ... of the training, r comes closer to t:

        r = t max(0, 1 - q^-a (1 + k sigmoid(-t)))

    Args:
        P_mean, P_std: of the normal distribution of ln(t).
        q, k: of r.
        stage: images per stage.
        stages: number of stages, the last of which does not end.
        huber: c, in units of the norm of a whole image.
    """

    def __init__(self, P_mean: float, P_std: float, q: float, k: float, stage: int, stages: int, huber: float):
        self.P_mean, self.P_std, self.q, self.k = P_mean, P_std, q, k
        self.stage_nimg, self.stages, self.huber = stage, stages, huber
        self.latest_stage = 0

    def stage(self, nimg: int) -> int:
        """a of the training step that begins after `nimg` images."""
        return min(1 + nimg // self.stage_nimg, self.stages)

    def gap(self, t: torch.Tensor, nimg: int) -> torch.Tensor:
        """t - r of each level t, shaped like it; t itself where r = 0."""
        share = self.q ** -self.stage(nimg) * (1 + self.k * torch.sigmoid(-t))
        return t * share.clamp(max=1)

    def __call__(
        self,
        net: Any,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        rnd: Any = None,
        nimg: int = 0,
    ) -> torch.Tensor:
        """Loss of each image, float32 [N].

        Args:
            net: called as net(x, sigma, labels), with EDM's preconditioning.
            images: clean images y, float32 [N, C, H, W].
            labels: conditions [N, ...] or None.
            t: higher noise levels [N]; drawn if None, within the network's own.
            noise: unit-variance noise n shaped like `images`; drawn if None.
            rnd: what they are drawn from (`StackedRandomGenerator`); None = torch's own generator.
            nimg: images seen in training before this step, which say the stage.
        """
        randn: Callable[..., torch.Tensor] = torch.randn if rnd is None else rnd.randn
        if t is None:
            low, high = noise_range(net)
            t = (self.P_mean + self.P_std * wide(randn([len(images)], device=images.device))).exp().clamp(low, high)
        if noise is None:
            noise = randn(images.shape, device=images.device)
        self.latest_stage, self.drawn = self.stage(nimg), {"sigma": t}
        gap = self.gap(t, nimg)
        clean = gap >= t
        r = torch.where(clean, t, t - gap)  # networks know no level 0, and need none here

        def f(level: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(seed)  # the same dropout masks, where torch's generator draws them
            return net(images + level.to(images).reshape(-1, 1, 1, 1) * noise, level, labels)

        seed = int(torch.randint(1 << 31, []))
        with torch.no_grad():
            target = torch.where(clean.reshape(-1, 1, 1, 1), images, f(r))
        square = (f(t) - target).square().flatten(1).sum(1)
        return ((square + self.huber**2).sqrt() - self.huber) / gap.to(square)

    def report(self) -> dict[str, Any]:
        return {"stage": self.latest_stage}


def consistency_objective(_net: nn.Module, config: ConsistencyTraining) -> WithoutSomeConditions:
    """What a run that tunes makes small."""
    arguments = config.objective.to_json()
    return WithoutSomeConditions(p=arguments.pop("cond_dropout"), objective=ConsistencyLoss(**arguments))
