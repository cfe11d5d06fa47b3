"""Power-function EMA: properties of the maths and the trackers."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT

from training import phema
from training.config.ema import MAX_STD, parse_std_list


class Ramp(torch.nn.Module):
    """A network whose only weight is the training time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros([2], dtype=torch.float64))
        self.register_buffer("buffer", torch.zeros([]))


def test_std_and_exp_are_inverse():
    stds = np.linspace(0.005, 0.288, 50)
    np.testing.assert_allclose(phema.exp_to_std(phema.std_to_exp(stds)), stds, rtol=1e-9)
    assert phema.exp_to_std(0) == pytest.approx(MAX_STD)


@pytest.mark.parametrize("std", [0.05, 0.10, 0.20])
def test_ema_of_a_linear_ramp_has_the_width_asked_for(std):
    # Averages of t and t^2 under the profile: their variance is (sigma_rel * T)^2.
    net = Ramp()
    ema = phema.PowerFunctionEMA(net, [std])
    T = 20000
    for t in range(1, T + 1):
        with torch.no_grad():
            net.weight.copy_(torch.tensor([t / T, (t / T) ** 2]))
        ema.update(t, 1)
    mean, mean_square = ema.get()[0][0].weight.tolist()
    assert (mean_square - mean**2) ** 0.5 == pytest.approx(std, rel=2e-3)


def test_reconstruction_of_synthetic_profiles():
    # Snapshots of two profiles approximate the response of a third.
    T, times, stds = 2000, np.arange(100, 2001, 100), [0.05, 0.10]
    grid_t, grid_s = np.meshgrid(times, stds, indexing="ij")
    basis = phema.power_function_response(grid_t.flatten(), grid_s.flatten(), T + 1)
    coefs = phema.solve_posthoc_coefficients(grid_t.flatten(), grid_s.flatten(), T, [0.03, 0.075, 0.15, 0.2])
    assert coefs.sum(axis=0) == pytest.approx(np.ones(4))
    target = phema.power_function_response([T] * 4, [0.03, 0.075, 0.15, 0.2], T + 1)
    error = np.linalg.norm(basis @ coefs - target, axis=0) / np.linalg.norm(target, axis=0)
    assert (error < [0.1, 0.01, 0.03, 0.05]).all(), error


def test_stored_profile_is_reproduced():
    coefs = phema.solve_posthoc_coefficients([100, 100, 200, 200], [0.05, 0.1, 0.05, 0.1], 200, [0.05, 0.1])
    np.testing.assert_allclose(coefs, [[0, 0], [0, 0], [1, 0], [0, 1]], atol=1e-9)


def test_posthoc_error_is_that_of_the_responses():
    """By sums over many times, in place of the closed form."""
    ofs, std = np.repeat([200.0, 500, 700, 1000], 2), np.tile([0.05, 0.1], 4)
    outs, steps = np.array([0.02, 0.05, 0.08, 0.2]), 20_001
    coefs = phema.solve_posthoc_coefficients(ofs, std, 1000, outs)
    made = phema.power_function_response(ofs * 20, std, steps) @ coefs
    wanted = phema.power_function_response(np.full(4, 20_000.0), outs, steps)
    expected = np.sqrt(((made - wanted) ** 2).sum(axis=0) / (wanted**2).sum(axis=0))
    found = phema.posthoc_error(ofs, std, 1000, outs, coefs)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)
    assert found[0] > 0.1 > found[2] > found[1]


def test_response_is_a_distribution_over_the_past():
    response = phema.power_function_response(50, 0.1, 100)
    assert response.sum() == pytest.approx(1)
    assert (response[51:] == 0).all()
    assert (np.diff(response[:51]) >= 0).all()


def test_tracker_copies_buffers_and_names_files():
    net = Ramp()
    ema = phema.PowerFunctionEMA(net, [0.05, 0.1])
    net.buffer.fill_(3)
    (first, name), (_, second_name) = ema.get()
    assert first.buffer == 3
    assert (name, second_name) == ("-0.050", "-0.100")
    assert not first.weight.requires_grad
    assert not first.training


def test_tracker_state_round_trip():
    net = Ramp()
    ema, other = phema.PowerFunctionEMA(net, [0.05]), phema.PowerFunctionEMA(net, [0.05])
    with torch.no_grad():
        net.weight.fill_(7)
    ema.update(4096, 2048)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.get()[0][0].weight, ema.get()[0][0].weight)
    with pytest.raises(ValueError, match="tracks stds"):
        phema.PowerFunctionEMA(net, [0.1]).load_state_dict(ema.state_dict())


def test_traditional_half_life():
    net = Ramp()
    ema = phema.TraditionalEMA(net, halflife_Mimg=0.001, rampup_ratio=None)
    with torch.no_grad():
        net.weight.fill_(1)
    ema.update(10**9, 1000)
    assert ema.get().weight[0].item() == pytest.approx(0.5)
    restored = phema.TraditionalEMA(net)
    restored.load_state_dict(ema.state_dict())
    assert torch.equal(restored.get().weight, ema.get().weight)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.05", [0.05]),
        ("0.05, 0.1", [0.05, 0.1]),
        ("0.01,0.02,...,0.05", [0.01, 0.02, 0.03, 0.04, 0.05]),
        ("0.01,0.02,...,0.04,0.1", [0.01, 0.02, 0.03, 0.04, 0.1]),
        ("[0.05,0.1]", [0.05, 0.1]),
    ],
)
def test_parse_std_list(text, expected):
    assert parse_std_list(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "0",
        "0.3",
        "-0.1",
        "nan",
        "...,0.1",
        "0.1,...,0.2",
        "0.1,0.2,...",
        "0.01,0.02,...,0.055",
        "0.1,0.1,...,0.2",
        "0.02,0.01,...,0.05",
    ],
)
def test_parse_std_list_refuses(text):
    with pytest.raises(ValueError, match="'"):
        parse_std_list(text)


def test_the_example_of_the_docs_runs():
    text = (ROOT / "docs" / "phema.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    found: dict = {}
    exec(example, found)
    assert len(found["saved"]) == 20
    # The task is to copy two of the inputs, and it has been learned.
    torch.testing.assert_close(found["combined"]["weight"], torch.eye(2, 4), rtol=0, atol=1e-3)
