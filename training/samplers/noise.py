"""Random numbers of samples."""

from collections.abc import Callable, Sequence

import torch


class StackedRandomGenerator:
    """One random generator per sample, so that a sample depends on its seed and not on its batch.

    Args:
        device: where the numbers are drawn.
        seeds: one integer per sample, taken modulo 2^32.

    The first dimension of every size asked for must equal the number of seeds.
    """

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        self.seeds = [int(seed) for seed in seeds]
        self.generators = [torch.Generator(device).manual_seed(int(seed) % 2**32) for seed in seeds]

    def __len__(self) -> int:
        return len(self.generators)

    def _stack(self, draw: Callable[..., torch.Tensor], size: Sequence[int], **kwargs) -> torch.Tensor:
        assert size[0] == len(self.generators), f"{len(self.generators)} generators cannot fill size {list(size)}"
        return torch.stack(
            [draw(list(size[1:]), generator=g, **{"device": g.device, **kwargs}) for g in self.generators]
        )

    def randn(self, size: Sequence[int], **kwargs) -> torch.Tensor:
        return self._stack(torch.randn, size, **kwargs)

    def rand(self, size: Sequence[int], **kwargs) -> torch.Tensor:
        return self._stack(torch.rand, size, **kwargs)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, high: int, size: Sequence[int], **kwargs) -> torch.Tensor:
        def draw(shape: list[int], **draw_kwargs) -> torch.Tensor:
            return torch.randint(high, shape, **draw_kwargs)

        return self._stack(draw, size, **kwargs)
