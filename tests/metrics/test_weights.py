"""Files of weights as users have them: of both formats of torch, damaged, hostile, of another network."""

import math
import os

import pytest
import torch
from torch import nn

from dnnlib.errors import UserError
from training.metrics.weights import check_finite, read_state


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


WRONG_STATES = {
    "missing": (lambda s: without(s, "0.bias"), r"\(missing 0.bias\)"),
    "of another network": (lambda s: {"weight": torch.zeros(2)}, r"\(missing 0.bias and 6 more\)"),
    "unexpected": (lambda s: {**s, "2.bias": torch.zeros(2)}, r"\(unexpected 2.bias\)"),
    "shape": (lambda s: {**s, "0.bias": torch.zeros(5)}, r"0.bias is \[5\] instead of \[4\]"),
    "code": (lambda s: {**s, "0.bias": Code()}, "not weights saved by torch.save, or damaged"),
    "numbers": (lambda s: {**s, "0.bias": 1.0}, "more than named tensors"),
    "list": (lambda s: list(s.values()), "more than named tensors"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_both_formats(zipped, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    state = read_state(tmp_path / "w.pth", net.state_dict())
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("case", WRONG_STATES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_wrong_states(case, zipped, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, fragment = WRONG_STATES[case]
    path = tmp_path / "w.pth"
    torch.save(change(net.state_dict()), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"w.pth: .*{fragment}") as err:
        read_state(path, net.state_dict())
    assert "\n" not in str(err.value) and len(str(err.value).replace(str(path), "")) < 300
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"<html>", b"PK\x03\x04", b"\x80\x02}q\x00.", b"junk" * 25])
def test_no_states(data, net, tmp_path):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(
        UserError, match="w.pth: not weights saved by torch.save, or damaged: copy or download it again$"
    ):
        read_state(tmp_path / "w.pth", net.state_dict())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("part", [0.5, 0.999])
def test_truncated_state(part, zipped, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match="w.pth: not weights saved by torch.save"):
        read_state(tmp_path / "w.pth", net.state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value, net, tmp_path):
    check_finite(tmp_path / "w.pth", net)
    with torch.no_grad():
        net[0].weight[1, 2] = value
    with pytest.raises(UserError, match="w.pth: 0.weight holds NaN or infinity"):
        check_finite(tmp_path / "w.pth", net)
