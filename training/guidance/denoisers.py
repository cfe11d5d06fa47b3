"""Denoisers that are made of others: guided, without a condition, or without an opinion."""

import torch

from dnnlib.errors import UserError
from training.config.guidance import GuidanceConfig
from training.denoiser import Denoiser, per_image
from training.guidance.rules import Projected, Rule, extrapolated, scaled_guide
from training.guidance.weights import EVERYWHERE, Weight, as_weight, inside, weight_of
from training.schedules import wide


class Unconditional:
    """A denoiser that forgets what it is asked for: the guide of classifier-free guidance by one network.

    Args:
        net: a denoiser that knows images without a condition, too.
    """

    def __init__(self, net: Denoiser):
        self.net = net

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(x, sigma, None)


class GuidedDenoiser:
    """Two denoisers as one: D_0 + w (D_1 - D_0) or another rule, with a weight that may depend on the noise level.

    Args:
        net: main denoiser, D_1.
        gnet: guiding denoiser, D_0, given the same labels (an unconditional one ignores them).
        guidance: weight w, or a function of the noise level (`weights`); 1 = no guidance.
        interval: noise levels lo < sigma <= hi at which guidance acts.
        rule: how the weight combines them (`rules`).

    Where no weight of a batch differs from 1, the guide is not evaluated.

    Raises:
        UserError: the interval is empty.
    """

    def __init__(
        self,
        net: Denoiser,
        gnet: Denoiser,
        guidance: float | Weight,
        interval: tuple[float, float] = EVERYWHERE,
        rule: Rule = extrapolated,
    ):
        lo, hi = interval
        if not lo < hi:
            raise UserError(f"guidance interval must satisfy lo < hi, not {lo},{hi}")
        self.net = net
        self.gnet = gnet
        self.weight = inside(as_weight(guidance), interval)
        self.rule = rule

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight(wide(sigma).reshape(-1))
        active = weight != 1
        D_main = self.net(x, sigma, labels)
        if not active.any():
            return D_main
        D_guide = self.gnet(x, sigma, labels)
        if len(weight) == 1:
            return self.rule(D_main, D_guide, weight.item(), x, sigma)
        D = self.rule(D_main, D_guide, per_image(weight, D_main), x, sigma)
        return torch.where(per_image(active, D_main) != 0, D, D_main)


class ZeroInit:
    """No velocity at the highest noise levels, where that of a guided denoiser is worse than none (arXiv 2503.18886).

    In the flow u = (1 - t) x of CFG-Zero*, u stays as it is where D = x / (1 + sigma).

    Args:
        net: what denoises at lower levels.
        level: the lowest noise level without a velocity.
    """

    def __init__(self, net: Denoiser, level: float):
        self.net, self.level = net, level

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        still = sigma.reshape(-1) >= self.level
        if not still.any():
            return self.net(x, sigma, labels)
        unmoved = x / (1 + per_image(sigma, x))
        return unmoved if still.all() else torch.where(per_image(still, x) != 0, unmoved, self.net(x, sigma, labels))


def guided(net: Denoiser, gnet: Denoiser, config: GuidanceConfig, levels: torch.Tensor) -> Denoiser:
    """The denoiser that a configuration makes of two, for one batch of images: momentum begins with it.

    Args:
        net, gnet: main and guiding denoiser.
        levels: noise levels of the sampler, decreasing, float64 on the CPU.
    """
    rules: dict[str, Rule] = {
        "apg": Projected(config.apg.eta, config.apg.norm, config.apg.momentum),
        "cfg-zero": scaled_guide,
    }
    rule = rules.get(config.guidance_method, extrapolated)
    denoiser = GuidedDenoiser(net, gnet, weight_of(config, levels), rule=rule)
    steps = min(config.zero_init_steps, len(levels) - 1)
    if config.guidance_method == "cfg-zero" and steps > 0:
        return ZeroInit(denoiser, levels[steps - 1].item())
    return denoiser
