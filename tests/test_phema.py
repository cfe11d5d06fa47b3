"""Power-function EMA: properties of the maths and the trackers."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_cli

from reconstruct_phema import main as reconstruct
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


def test_averages_that_are_too_alike():
    """Six widths at 32 times leave nothing that float64 could tell apart."""
    widths = [0.05, 0.06, 0.07, 0.08, 0.09, 0.10]
    times = np.repeat(np.arange(1, 33), len(widths))
    with pytest.raises(ValueError, match=r"the 192 stored averages are too alike .*\(condition number \de\+1[89]"):
        phema.solve_posthoc_coefficients(times, np.tile(widths, 32), 32, 0.02)
    alike = phema.solve_posthoc_coefficients(times[::3], np.tile([0.05, 0.08], 32), 32, 0.05)[:, 0]
    np.testing.assert_allclose(alike, np.eye(64)[62], atol=1e-8)  # of two widths it works


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


def follow(ema: phema.PowerFunctionEMA, net: Ramp, weights, first: int = 1) -> None:
    """Steps of 10 images, after which the weight has these values."""
    for step, weight in enumerate(weights, first):
        with torch.no_grad():
            net.weight.fill_(weight)
        ema.update(10 * step, 10)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_average_of_every_few_steps_is_the_integral_of_the_profile(every):
    """Weights that are taken in at t count for the time since the last ones: (t^e - t_last^e) / T^e, e = gamma + 1."""
    net, weights = Ramp(), [float(w) for w in np.random.default_rng(0).normal(size=20)]
    ema = phema.PowerFunctionEMA(net, [0.05, 0.2], every=every)
    follow(ema, net, weights[:8])
    ema.get()  # up to the latest step, also between two updates
    follow(ema, net, weights[8:], first=9)
    averages = [averaged.weight[0].item() for averaged, _ in ema.get()]
    taken = sorted({8, 20, *range(every, 8, every), *range(8 + every, 20, every)})
    for std, average in zip([0.05, 0.2], averages, strict=True):
        times = np.array([0, *taken]) / 20
        share = np.diff(times ** (phema.std_to_exp(std) + 1))
        assert average == pytest.approx(float(share @ [weights[t - 1] for t in taken]), rel=1e-12)


def test_fewer_updates_of_the_same_weights_are_the_same_average():
    net, weights = Ramp(), np.repeat([1.0, -2.0, 0.5, 4.0], 5)
    trackers = [phema.PowerFunctionEMA(net, [0.05, 0.1], every=every) for every in (1, 5)]
    for ema in trackers:
        follow(ema, net, weights)
    each, fifth = ([averaged.weight for averaged, _ in ema.get()] for ema in trackers)
    torch.testing.assert_close(each, fifth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_a_module_in_half_precision_are_float32(dtype):
    """A thousand small steps, each of which a half-precision average would round away."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).to(dtype)
    ema = phema.PowerFunctionEMA(net, [0.1])
    with torch.no_grad():
        net[0].weight.fill_(1)
    ema.update(1_000_000, 1_000_000)
    with torch.no_grad():
        net[0].weight.fill_(2)
    for step in range(1000):
        ema.update(1_000_000 + 10 * (step + 1), 10)
    ((averaged, _),) = ema.get()
    assert {t.dtype for t in averaged.state_dict().values()} == {torch.float32, torch.int64}
    share = 1 - (1 / 1.01) ** (phema.std_to_exp(0.1) + 1)
    torch.testing.assert_close(averaged[0].weight, torch.full([2, 2], 1 + float(share)), rtol=1e-5, atol=0)
    assert averaged(torch.ones(3, 2)).dtype == torch.float32
    assert net[0].weight.dtype == dtype


def test_shared_parameters_are_averaged_once():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).to(torch.bfloat16)
    net[1].weight = net[0].weight
    ema = phema.PowerFunctionEMA(net, [0.1], device="cpu")
    ema.update(10, 10)
    ((averaged, _),) = ema.get()
    assert averaged[0].weight is averaged[1].weight
    torch.testing.assert_close(averaged[0].weight, net[0].weight.float())


@pytest.mark.gpu
def test_update_on_a_gpu_waits_for_nothing():
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)])
    ema = phema.PowerFunctionEMA(net, [0.05, 0.1])
    ema.update(10, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(20, 10)
        with pytest.raises(RuntimeError, match="synchronizing"):
            net[0].weight.sum().item()  # so that the mode is known to work
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_averages_that_are_kept_off_the_gpu():
    net = torch.nn.Linear(64, 64, device="cuda")
    here, there = phema.PowerFunctionEMA(net, [0.1]), phema.PowerFunctionEMA(net, [0.1], device="cpu", every=2)
    for step in range(1, 8):
        if step % 2:  # each value lasts for two steps
            with torch.no_grad():
                net.weight += 1
        here.update(step, 1)
        there.update(step, 1)
    (a, _), (b, _) = here.get()[0], there.get()[0]
    assert b.weight.device.type == "cpu" and a.weight.device.type == "cuda"
    torch.testing.assert_close(b.weight, a.weight.cpu())
    assert not torch.equal(b.weight, net.weight.cpu())


def test_tracker_state_round_trip():
    """Also between two updates."""
    net = Ramp()
    ema, other = (phema.PowerFunctionEMA(net, [0.05, 0.1], every=3) for _ in range(2))
    follow(ema, net, range(7))
    other.load_state_dict(ema.state_dict())
    for tracker in (ema, other):
        follow(tracker, net, range(7, 12), first=8)
    assert [a.weight.tolist() for a, _ in other.get()] == [a.weight.tolist() for a, _ in ema.get()]


def changed(state: dict, **entries) -> dict:
    return {key: value for key, value in {**state, **entries}.items() if value is not None}


def test_tracker_refuses_other_states():
    net = Ramp()
    ema = phema.PowerFunctionEMA(net, [0.05])
    follow(ema, net, [1, 2])
    state, before = ema.state_dict(), ema.get()[0][0].weight.clone()
    (weights,) = state["emas"]
    wrong = [
        (changed(state, stds=[0.1]), r"tracks stds \[0.1\], not \[0.05\]"),
        (changed(state, emas=[]), "tracks stds"),
        (changed(state, stds=None), "EMA state lacks 'stds'"),
        (changed(state, ema=1), "EMA state has unknown 'ema'"),
        (changed(state, emas=[changed(weights, weight=None)]), "lacks 'weight'"),
        (changed(state, emas=[changed(weights, bias=torch.zeros(2))]), "has unknown 'bias'"),
        (changed(state, emas=[changed(weights, weight=torch.zeros(3))]), r"'weight' is \[3\] instead of \[2\]"),
    ]
    for other, message in wrong:
        with pytest.raises(ValueError, match=message):
            ema.load_state_dict(other)
        assert torch.equal(ema.get()[0][0].weight, before)
    ema.load_state_dict(changed(state, nimg=None, pending=None))  # of an earlier version


def test_the_file_works_alone(tmp_path):
    shutil.copy(ROOT / "training" / "phema.py", tmp_path / "phema.py")
    code = (
        "import sys; sys.path.insert(0, '.'); import torch, phema; net = torch.nn.Linear(2, 1); "
        "ema = phema.PowerFunctionEMA(net); ema.update(1, 1); print([name for _, name in ema.get()])"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "['-0.050', '-0.100']", result.stderr


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


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    """As printed: training, the command, and what is loaded."""
    text = (ROOT / "docs" / "phema.md").read_text()
    text = text[text.index("## In other projects") :]
    training, loading = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"```bash\npython reconstruct_phema.py (.*?)\n```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: dict = {}
    exec(training, found)
    assert len(list((tmp_path / "averages").iterdir())) == 20
    result = run_cli(reconstruct, *command.split())
    assert result.exit_code == 0, result.output
    exec(loading, found)
    states = [(k, std, torch.load(f"averages/net-{k}-{std}.pt")) for k in range(100, 1001, 100) for std in (0.05, 0.1)]
    times, widths, _ = zip(*states, strict=True)
    coefs = phema.solve_posthoc_coefficients(times, widths, 1000, 0.15)[:, 0]
    wanted = sum(float(c) * state["2.weight"].double() for c, (_, _, state) in zip(coefs, states, strict=True))
    net = found["net"].eval()
    torch.testing.assert_close(net[2].weight.double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(net[1].running_var, states[-1][2]["1.running_var"])
    x = torch.randn(1000, 4)
    assert (net(x) - x[:, :2]).square().mean() < 0.1  # the task is to copy two of the inputs
