"""Statistics of a training run."""

import math

import pytest
import torch

from torch_utils.training_stats import Collector


def test_mean_and_standard_deviation():
    collector = Collector("cpu")
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    for part in values:
        collector.report("loss", part)
    collector.report("lr", torch.tensor(0.5))
    result = collector.collect()
    assert result["loss"] == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert result["loss_std"] == pytest.approx(values.double().std(correction=0).item(), rel=1e-9)
    assert (result["lr"], result["lr_std"]) == (0.5, 0)
    assert collector.collect() == {}


def test_values_that_are_not_finite_do_not_count():
    collector = Collector("cpu")
    collector.report("a", torch.tensor([1.0, math.nan, math.inf, 3.0]))
    collector.report("b", torch.tensor([math.nan]))
    result = collector.collect()
    assert (result["a"], result["a_std"]) == (2, 1)
    assert math.isnan(result["b"]) and math.isnan(result["b_std"])


def test_states_continue():
    values = torch.arange(10.0)
    whole, first, second = (Collector("cpu") for _ in range(3))
    whole.report("loss", values)
    first.report("loss", values[:4])
    second.load_state_dict(first.state_dict())
    second.report("loss", values[4:])
    assert second.collect() == whole.collect()
    assert first.collect()["loss"] == 1.5  # saving takes nothing away


def test_of_a_state_only_the_first_process_has_the_moments(monkeypatch):
    collector = Collector("cpu")
    collector.report("loss", torch.arange(4.0))
    state = collector.state_dict()
    monkeypatch.setattr("torch_utils.distributed.get_rank", lambda: 1)
    other = Collector("cpu")
    other.load_state_dict(state)
    assert other.state_dict().keys() == {"loss"}
    assert math.isnan(other.collect()["loss"])
