"""Golden files of a family: found by pattern, read with what their descriptions say."""

import json

import numpy as np
import torch
from conftest import GOLDEN


class GoldenFile:
    """The arrays of a file, and its description; subclasses say of which family."""

    family: str

    def __init__(self, name: str):
        with np.load(GOLDEN / self.family / f"{name}.npz") as f:
            self.arrays = dict(f)
        self.meta = json.loads(str(self.arrays.pop("meta_json")))

    @classmethod
    def names(cls, pattern: str) -> list[str]:
        """Names of the files of a pattern, of which there must be one."""
        room = GOLDEN / cls.family
        found = sorted(room.glob(f"{pattern}.npz"))
        assert found, f"{room}: no golden file {pattern}.npz"
        return [str(path.relative_to(room).with_suffix("")) for path in found]

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def get(self, *keys: str) -> torch.Tensor | None:
        """The first of these arrays that is there."""
        return next((self[key] for key in keys if key in self.arrays), None)

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """Arrays named `prefix/...`, without the prefix."""
        return {key[len(prefix) + 1 :]: self[key] for key in self.arrays if key.startswith(f"{prefix}/")}


def error(actual: torch.Tensor, expected: torch.Tensor | np.ndarray) -> float:
    """Largest absolute difference, relative to the largest absolute value."""
    a, b = (torch.as_tensor(t).detach().double() for t in (actual, expected))
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def rule_p(net: torch.nn.Module, phase: float = 0) -> None:
    """Fill a network by rule P of the descriptions."""
    for n, (name, parameter) in enumerate(sorted(net.named_parameters())):
        K = parameter.numel()
        q = torch.sin(1 + n + phase + 0.61803 * torch.arange(K, dtype=torch.float64)).reshape(parameter.shape)
        if parameter.ndim >= 2:
            q *= (2 * parameter.shape[0] / K) ** 0.5
        else:
            q = 1 + 0.1 * q if name.endswith("weight") else 0.1 * q
        parameter.data.copy_(q)
