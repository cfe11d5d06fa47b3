"""What devices compute in."""

import pytest
import torch

from torch_utils import device
from torch_utils.device import resolve_precision, speed_of_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speed", "noted"), [(4.0, False), (1.0, False), (0.2, True)])
def test_a_precision_that_loses_is_noted(monkeypatch, capsys, speed, noted):
    monkeypatch.setattr(device, "speed_of_bf16", lambda: speed)
    assert resolve_precision("bf16", CPU) == "bf16"
    assert ("takes 5.0 times as long as in fp32" in capsys.readouterr().out) == noted
    assert resolve_precision("auto", CPU) == "fp32"
    assert capsys.readouterr().out == ""


def test_speed_is_measured_once():
    assert 0.01 < speed_of_bf16() < 100
    assert speed_of_bf16() == speed_of_bf16()
