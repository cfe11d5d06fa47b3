"""Distributions of NVAE: normal latents, and images given the network's last features (its logits).

Decoders see images with values in [0, 1] and compute in float32 whatever the autocast. Vahdat & Kautz 2020, appendix A
(arXiv 2007.03898); mixtures of discretised logistics: Salimans et al. 2017, "PixelCNN++" (arXiv 1701.05517), section 2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

RandnLike = Callable[[torch.Tensor], torch.Tensor]
SIGMA_MIN = 0.01  # added to each standard deviation
LOG_SCALE_MIN = -7.0
UNIFORM_MIN = 1e-5  # uniform draws stay in [UNIFORM_MIN, 1 - UNIFORM_MIN]
TINY_MASS = 1e-5  # below it, the mass of a bin is its density times its width
FAR = 1e4  # standard deviations; beyond lies no mass
NARROW_BIN = 2e-3  # standard deviations; the mass of a narrower bin is its density times its width
PUBLISHED_UPPER_EDGE = 0.99  # in the published code, what lies above belongs to the last bin: 254 as well as 255


def soft_clamp(x: torch.Tensor) -> torch.Tensor:
    """5 tanh(x / 5): smoothly bounded to [-5, 5]."""
    return 5 * torch.tanh(x / 5)


class Normal:
    """Independent normals with mean c(mu) and standard deviation (e^c(log_sigma) + 0.01) temperature.

    c is `soft_clamp`. So mu = log_sigma = 0 has a standard deviation of 1.01.
    """

    def __init__(self, mu: torch.Tensor, log_sigma: torch.Tensor, temperature: float = 1):
        self.mu = soft_clamp(mu.float())
        self.sigma = (soft_clamp(log_sigma.float()).exp() + SIGMA_MIN) * temperature

    @classmethod
    def split(cls, parameters: torch.Tensor, temperature: float = 1) -> "Normal":
        """The normals of parameters [N, 2 C, H, W], which hold C times mu, then C times log_sigma."""
        mu, log_sigma = parameters.chunk(2, dim=1)
        return cls(mu, log_sigma, temperature)

    def sample(self, eps: torch.Tensor) -> torch.Tensor:
        """mu + sigma eps for draws `eps` ~ N(0, I)."""
        return torch.addcmul(self.mu, self.sigma, eps)

    def standardize(self, z: torch.Tensor) -> torch.Tensor:
        """(z - mu) / sigma: what `sample` turns into z."""
        return (z - self.mu) / self.sigma

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density of each element."""
        return -0.5 * self.standardize(z).square() - 0.5 * math.log(2 * math.pi) - self.sigma.log()

    def kl(self, other: "Normal") -> torch.Tensor:
        """KL(self || other) of each element."""
        ratio = self.sigma / other.sigma
        distance = (self.mu - other.mu) / other.sigma
        return 0.5 * (distance.square() + ratio.square()) - 0.5 - ratio.log()


class Decoder(Protocol):
    """Distribution of an image given logits [N, `logit_channels`, H, W]."""

    logit_channels: int
    levels: int
    """Grey levels of an image: it has the values 0, 1 / (levels - 1), ..., 1."""

    def log_prob(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Log-probability in nats of images [N, C, H, W], per pixel: [N, 1 or C, H, W]."""
        ...

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        """Expected image [N, C, H, W], in [0, 1]."""
        ...

    def draws(self, logits: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> list[torch.Tensor]:
        """The random numbers that one call of `sample` takes."""
        ...

    def sample(self, logits: torch.Tensor, draws: Sequence[torch.Tensor], temperature: float = 1) -> torch.Tensor:
        """Random image [N, C, H, W], in [0, 1]."""
        ...


def _uniform(template: torch.Tensor, randn_like: RandnLike) -> torch.Tensor:
    """Uniform draws made of normal ones, so that one kind of source serves for everything."""
    return torch.special.ndtr(randn_like(template)).clamp(UNIFORM_MIN, 1 - UNIFORM_MIN)


class BernoulliDecoder:
    """Black and white images of one channel."""

    logit_channels = 1
    levels = 2

    def log_prob(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -F.binary_cross_entropy_with_logits(logits.float(), x.float(), reduction="none")

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float().sigmoid()

    def draws(self, logits: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> list[torch.Tensor]:
        return [_uniform(logits.new_empty(logits.shape, dtype=torch.float32), randn_like)]

    def sample(self, logits: torch.Tensor, draws: Sequence[torch.Tensor], temperature: float = 1) -> torch.Tensor:
        return (draws[0] < (logits.float() / temperature).sigmoid()).float()


class LogisticMixtureDecoder:
    """Mixture of discretised logistic distributions, for images of one or three channels.

    With y = 2x - 1, the logits are K mixture weights, then for each colour K means, K log-scales and K coefficients
    (only with three channels). The mean of green depends on red, that of blue on red and green, linearly.

    Args:
        channels: 1 or 3.
        mixtures: K.
        levels: grey levels of an image; the bins are 2 / (levels - 1) wide, the first and last one reach to infinity.
        published: compute as the published code, where level 254 of 256 counts as the last bin, too, so that the
            probabilities do not sum to 1, and where a lower temperature means a wider logistic.
    """

    def __init__(self, channels: int, mixtures: int, levels: int = 256, published: bool = False):
        assert channels in (1, 3), channels
        self.channels = channels
        self.mixtures = mixtures
        self.levels = levels
        self.published = published
        self.parts = 3 if channels == 3 else 2  # means, log-scales, coefficients
        self.logit_channels = mixtures * (1 + channels * self.parts)

    def _split(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Mixture logits [N, K, H, W]; means, log-scales and, with three channels, coefficients [N, C, K, H, W]."""
        logits = logits.float()
        weights, rest = logits[:, : self.mixtures], logits[:, self.mixtures :]
        means, log_scales, *coeffs = rest.unflatten(1, (self.channels, -1)).chunk(self.parts, dim=2)
        return weights, [means, log_scales.clamp(min=LOG_SCALE_MIN), *(c.tanh() for c in coeffs)]

    def log_prob(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weights, (means, log_scales, *coeffs) = self._split(logits)
        y = (2 * x.float() - 1).unsqueeze(2)
        if coeffs:
            r, g, _ = y.unbind(1)
            c0, c1, c2 = coeffs[0].unbind(1)
            m0, m1, m2 = means.unbind(1)
            means = torch.stack([m0, m1 + c0 * r, m2 + c1 * r + c2 * g], dim=1)
        log_mass = self._log_bin_mass(y, means, log_scales).sum(dim=1)
        return torch.logsumexp(log_mass + weights.log_softmax(dim=1), dim=1, keepdim=True)

    def _log_bin_mass(self, y: torch.Tensor, means: torch.Tensor, log_scales: torch.Tensor) -> torch.Tensor:
        """Log of the mass of the bin around y, for y [N, C, 1, H, W], elementwise over the mixture."""
        half = 1 / (self.levels - 1)
        upper_edge = PUBLISHED_UPPER_EDGE if self.published else 1 - half
        inverse = (-log_scales).exp()
        middle = (y - means) * inverse
        plus, minus = middle + half * inverse, middle - half * inverse
        mass = plus.sigmoid() - minus.sigmoid()
        log_density = middle - log_scales - 2 * F.softplus(middle)
        tiny = log_density + math.log(2 * half)
        inner = torch.where(mass > TINY_MASS, mass.clamp(min=1e-10).log(), tiny)
        outer = torch.where(y > upper_edge, -F.softplus(minus), inner)
        return torch.where(y < -1 + half, F.logsigmoid(plus), outer)

    def _image(self, m: torch.Tensor, coeffs: torch.Tensor | None) -> torch.Tensor:
        """Image of means (or samples without the other colours' part) and coefficients [N, C, H, W]."""
        if coeffs is None:
            return m.clamp(-1, 1) / 2 + 0.5
        (m0, m1, m2), (c0, c1, c2) = m.unbind(1), coeffs.unbind(1)
        r = m0.clamp(-1, 1)
        g = (m1 + c0 * r).clamp(-1, 1)
        b = (m2 + c1 * r + c2 * g).clamp(-1, 1)
        return torch.stack([r, g, b], dim=1) / 2 + 0.5

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        weights, (means, _, *coeffs) = self._split(logits)
        p = weights.softmax(dim=1).unsqueeze(1)
        return self._image((p * means).sum(dim=2), (p * coeffs[0]).sum(dim=2) if coeffs else None)

    def draws(self, logits: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> list[torch.Tensor]:
        n, _, h, w = logits.shape
        shapes = [(n, self.mixtures, h, w), (n, self.channels, h, w)]
        return [_uniform(logits.new_empty(shape, dtype=torch.float32), randn_like) for shape in shapes]

    def sample(self, logits: torch.Tensor, draws: Sequence[torch.Tensor], temperature: float = 1) -> torch.Tensor:
        """
        Args:
            draws: uniforms [N, K, H, W] that choose the component, and [N, C, H, W] within it.
        """
        weights, parts = self._split(logits)
        gumbel = -(-draws[0].log()).log()
        chosen = (weights / temperature + gumbel).argmax(dim=1, keepdim=True)
        index = chosen.unsqueeze(1).expand(-1, self.channels, -1, -1, -1)
        m, log_scale, *coeffs = [part.gather(2, index).squeeze(2) for part in parts]
        scale = log_scale.exp() * (1 / temperature if self.published else temperature)
        m = m + scale * (draws[1].log() - (-draws[1]).log1p())
        return self._image(m, coeffs[0] if coeffs else None)


def _log_interval_mass(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Log of the mass of a unit normal between two places, left < right, precise in the tails."""
    mirror = left + right > 0  # to the left of 0, where differences of the distribution function are exact
    log_upper = torch.special.log_ndtr(torch.where(mirror, -left, right))
    log_lower = torch.special.log_ndtr(torch.where(mirror, -right, left))
    return log_upper + (-torch.expm1(log_lower - log_upper)).log()


class NormalDecoder:
    """Normal distribution of each value y = 2x - 1: logits are C means and C log-scales, as those of `Normal`.

    Args:
        channels: C.
        levels: grey levels of an image. The likelihood is that of the bin around each level.
        published: take the density at the level for its likelihood, as the published code does.
    """

    def __init__(self, channels: int, levels: int = 256, published: bool = False):
        self.levels = levels
        self.published = published
        self.logit_channels = 2 * channels

    def log_prob(self, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        normal = Normal.split(logits)
        y = 2 * x.float() - 1
        if self.published:
            return normal.log_prob(y)
        half = 1 / (self.levels - 1)
        left = torch.where(y < -1 + half, -FAR, normal.standardize(y - half))
        right = torch.where(y > 1 - half, FAR, normal.standardize(y + half))
        narrow = normal.log_prob(y) + math.log(2 * half)
        return torch.where(right - left < NARROW_BIN, narrow, _log_interval_mass(left, right))

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        return Normal.split(logits).mu.clamp(-1, 1) / 2 + 0.5

    def draws(self, logits: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> list[torch.Tensor]:
        n, channels, h, w = logits.shape
        return [randn_like(logits.new_empty((n, channels // 2, h, w), dtype=torch.float32))]

    def sample(self, logits: torch.Tensor, draws: Sequence[torch.Tensor], temperature: float = 1) -> torch.Tensor:
        normal = Normal.split(logits, temperature)
        return normal.sample(draws[0]).clamp(-1, 1) / 2 + 0.5
