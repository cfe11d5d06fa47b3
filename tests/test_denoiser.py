"""Raw networks become denoisers: coefficients, types and shapes."""

import pytest
import torch
from ideal import STD, Ideal
from torch import nn

from dnnlib.errors import UserError
from training.denoiser import Preconditioned
from training.preconditioning import Epsilon
from training.schedules import VE, VP, DiscreteVE, DiscreteVP, SubVP


@pytest.mark.parametrize("schedule", [VE(), VP(), SubVP(), DiscreteVP()], ids=repr)
def test_epsilon_gives_the_ideal_denoiser(schedule):
    D = Preconditioned(Ideal(schedule), Epsilon(schedule), spec=None)
    t = torch.tensor([1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    sigma = schedule.sigma(t)
    noise = torch.randn(4, 3, 2, 2)
    x = noise * (STD**2 + sigma**2).sqrt().float().reshape(-1, 1, 1, 1)
    expected = (STD**2 / (STD**2 + sigma**2)).reshape(-1, 1, 1, 1) * x.double()
    out = D(x, sigma)
    assert out.dtype == torch.float32
    # D is the small difference of x and sigma n, each rounded to float32.
    assert float((out - expected).abs().max() / x.abs().max()) < 1e-6
    assert D.sigma_min == schedule.sigma_min and D.sigma_max == schedule.sigma_max
    for k in range(4):
        torch.testing.assert_close(D(x[k : k + 1], float(sigma[k])), out[k : k + 1])


def test_labels_are_float32_and_one_sigma_gives_one_label():
    net = Ideal(VP())
    D = Preconditioned(net, Epsilon(VP()), spec=None)
    D(torch.randn(3, 1, 2, 2), torch.tensor(2.0, dtype=torch.float64))
    D(torch.randn(3, 1, 2, 2), torch.full([3], 2.0))
    assert [tuple(labels.shape) for labels in net.seen[1::2]] == [(1,), (3,)]
    assert all(labels.dtype == torch.float32 for labels in net.seen[1::2])
    torch.testing.assert_close(net.seen[3], (999 * VP().time(2.0)).float().expand(3), rtol=1e-6, atol=0)


def test_discrete_labels_are_whole():
    """DiscreteVE and DiscreteVP take the nearest level."""
    for schedule in (DiscreteVE(num_scales=30), DiscreteVP(num_scales=30)):
        labels = Epsilon(schedule)(torch.logspace(-2, 2, 20, dtype=torch.float64)).c_noise
        torch.testing.assert_close(labels, labels.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(precision, dtype):
    net = Ideal(VE())
    D = Preconditioned(net, Epsilon(VE()), spec="kept", precision=precision)
    assert D(torch.randn(2, 1, 4, 4), torch.tensor([1.0])).dtype == torch.float32
    assert net.seen[0].dtype == dtype
    assert D.spec == "kept"


def test_fp16_computes_in_fp32_on_a_cpu():
    net = Ideal(VE())
    Preconditioned(net, Epsilon(VE()), spec=None, precision="fp16")(torch.randn(1, 1, 4, 4), 1.0)
    assert net.seen[0].dtype == torch.float32


def test_unknown_precision():
    with pytest.raises(UserError, match="fp64"):
        Preconditioned(nn.Identity(), Epsilon(VE()), spec=None, precision="fp64")
