"""Attribution of NaN to a layer."""

import pytest
import torch
from torch import nn

from torch_utils.nonfinite import nonfinite_by_name, nonfinite_origin


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), Root()), nn.Linear(2, 2))


def test_origin():
    layers = net()
    assert nonfinite_origin(layers, lambda: layers(torch.ones(1, 2))) is None
    layers[1][0] = nn.Identity()
    with torch.no_grad():
        layers[0].bias.fill_(-10)
    assert nonfinite_origin(layers, lambda: layers(torch.ones(1, 2))) == "1.1"
    assert not any(m._forward_hooks for m in layers.modules())
    assert nonfinite_origin(layers, lambda: layers(torch.full([1, 2], torch.nan))) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_counts(value):
    layers = net()
    assert nonfinite_by_name(layers.named_parameters()) == {}
    with torch.no_grad():
        layers[2].bias[1] = value
        layers[0].weight[:] = -value
    assert nonfinite_by_name([*layers.named_parameters(), ("none", None)]) == {"0.weight": 4, "2.bias": 1}
