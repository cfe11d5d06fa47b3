"""Conditions: what a network is given beside the noisy image, and what its data look like."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.config.data import HUGE, MAX_CHANNELS, MAX_CLASSES, MAX_RESOLUTION, MAX_TOKENS
from training.config.fields import Config, option

KINDS = ("none", "classes", "vector", "tokens")


@dataclass(frozen=True, kw_only=True)
class Conditioning(Config):
    """What conditions are: none, one-hot class vectors or other vectors, float32 [N, size], or the tokens of texts,
    float32 [N, tokens, size].

    `optional` says whether the network also knows images without a condition. Zeros stand for none, whatever the
    network makes of them: EDM2 takes them as they are, U-ViT has a class for them, or the tokens of the empty text.
    """

    kind: str = option("none", flag=None, choices=KINDS)
    size: int = option(0, flag=None, low=0, high=MAX_CLASSES)
    tokens: int = option(0, flag=None, low=0, high=MAX_TOKENS)
    optional: bool = option(False, flag=None)

    @staticmethod
    def of_labels(label_dim: int) -> "Conditioning":
        """Class vectors of that length; 0 = no conditions."""
        return Conditioning(kind="classes" if label_dim > 0 else "none", size=label_dim)

    @staticmethod
    def of_text(tokens: int, width: int) -> "Conditioning":
        """Texts of so many tokens."""
        return Conditioning(kind="tokens", size=width, tokens=tokens)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one condition."""
        return {"none": (), "tokens": (self.tokens, self.size)}.get(self.kind, (self.size,))

    @property
    def num_classes(self) -> int:
        """How many classes there are to choose from; 0 = conditions are no classes."""
        return 0 if self.kind == "tokens" else self.size

    def describe(self) -> str:
        """What images follow, in words."""
        tokens = f"texts of {self.tokens} tokens of width {self.size}"
        return {"none": "nothing", "classes": f"{self.size} classes", "tokens": tokens}.get(
            self.kind, f"vectors of {self.size} numbers"
        )

    def null(self, n: int, device: torch.device | str) -> torch.Tensor | None:
        """What stands for no condition: zeros [n, ...], or None where there are no conditions."""
        return None if self.kind == "none" else torch.zeros([n, *self.shape], device=device)

    def draw(self, rnd: Any, n: int, class_idx: int | Sequence[int] | None = None) -> torch.Tensor | None:
        """Conditions of n generated images: uniformly drawn classes [n, size], the null condition where images follow
        texts, or None where there are no conditions.

        Args:
            rnd: random numbers of each image (`StackedRandomGenerator`).
            class_idx: the class of all images, or of each; a class is drawn all the same, so that later draws do not
                depend on it.
        """
        if self.kind == "none":
            return None
        if self.kind == "tokens":
            return self.null(n, rnd.generators[0].device)
        classes = rnd.randint(self.size, [n])
        if class_idx is not None:
            classes = torch.as_tensor(class_idx, dtype=classes.dtype, device=classes.device).expand_as(classes)
        return torch.nn.functional.one_hot(classes, self.size).float()

    def drop(self, cond: torch.Tensor | None, p: float, rnd: Any) -> torch.Tensor | None:
        """Conditions [N, ...], each replaced by the null condition with probability p, as its own generator decides.

        With it, one network learns to denoise with and without a condition (Ho & Salimans 2022, arXiv 2207.12598).
        """
        if cond is None or p == 0:
            return cond
        null = self.null(len(cond), cond.device)
        assert null is not None
        dropped = rnd.rand([len(cond)]) < p
        return torch.where(dropped.reshape(-1, *[1] * (cond.ndim - 1)), null, cond)


@dataclass(frozen=True, kw_only=True)
class DataSpec(Config):
    """What a network's images look like, and what conditions it takes; `pixel_range` is what black and white are."""

    channels: int = option(flag=None, low=1, high=MAX_CHANNELS)
    resolution: int = option(flag=None, low=1, high=MAX_RESOLUTION)
    conditioning: Conditioning = Conditioning()
    pixel_range: tuple[float, float] = option((-1.0, 1.0), flag=None, low=-HUGE, high=HUGE)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image, (C, H, W)."""
        return (self.channels, self.resolution, self.resolution)
