"""The denoiser around U-ViT: what conditions may be, and what stands for none."""

import math

import pytest
import torch

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.networks.uvit_denoiser import UViTDenoiser
from training.preconditioning import DataPrediction, EDMOfSchedule, Epsilon
from training.schedules import VP

SMALL = dict(embed_dim=16, depth=3, num_heads=2)
CLASSES, TEXT = Conditioning.of_labels(3), Conditioning.of_text(4, 6)
SIGMA = torch.tensor([0.5, 2.0])


def denoiser(conditioning: Conditioning = CLASSES, **arguments) -> UViTDenoiser:
    torch.manual_seed(0)
    data = DataSpec(channels=2, resolution=8, conditioning=conditioning)
    return UViTDenoiser(data, **{**SMALL, **arguments}).eval().requires_grad_(False)


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_class_is_a_number_or_a_vector():
    net, x = denoiser(), images()
    vectors = torch.eye(3)[[2, 0]]
    D = net(x, SIGMA, vectors)
    assert torch.equal(D, net(x, SIGMA, torch.tensor([2, 0])))
    assert torch.equal(D, net(x, SIGMA, torch.eye(4)[[2, 0]]))
    assert not torch.allclose(D, net(x, SIGMA, torch.tensor([1, 0])))


def test_no_class_is_the_last_one_of_the_raw_network():
    net, x = denoiser(), images()
    assert net.spec.conditioning.optional and net.spec.conditioning.size == 3
    D = net(x, SIGMA, torch.tensor([3, 3]))
    for none in (None, torch.zeros(2, 3), net.spec.conditioning.null(2, "cpu")):
        assert torch.equal(D, net(x, SIGMA, none))
    mixed = net(x, SIGMA, torch.tensor([[0.0, 1, 0], [0, 0, 0]]))
    torch.testing.assert_close(mixed, net(x, SIGMA, torch.tensor([1, 3])))


def test_without_a_null_class():
    net = denoiser(null_class=False)
    assert net.net.label_emb.num_embeddings == 3 and not net.spec.conditioning.optional
    with pytest.raises(UserError, match="knows no images without a class"):
        net(images(), SIGMA)


def test_no_text_is_the_empty_one():
    net, x = denoiser(TEXT), images()
    contexts = torch.randn(3, 4, 6)
    net.empty_context.copy_(contexts[2])
    D = net(x, SIGMA, contexts[[2, 2]])
    for none in (None, torch.zeros(2, 4, 6)):
        assert torch.equal(D, net(x, SIGMA, none))
    mixed = net(x, SIGMA, torch.stack([contexts[0], torch.zeros(4, 6)]))
    torch.testing.assert_close(mixed, net(x, SIGMA, contexts[[0, 2]]))
    assert "empty_context" in net.state_dict() and "empty_context" not in net.net.state_dict()
    with pytest.raises(UserError, match=r"contexts of \[4, 6\] per image are needed, not \[4, 7\]"):
        net(x, SIGMA, torch.zeros(2, 4, 7))


def test_a_network_without_conditions_looks_at_none():
    net, x = denoiser(Conditioning()), images()
    assert torch.equal(net(x, SIGMA), net(x, SIGMA, torch.eye(3)[:2]))


@pytest.mark.parametrize("schedule", ["continuous", "cosine", "discrete"])
@pytest.mark.parametrize(("prediction", "kind"), [("noise", Epsilon), ("data", DataPrediction), ("edm", EDMOfSchedule)])
def test_predictions(schedule, prediction, kind):
    net, x = denoiser(schedule=schedule, prediction=prediction), images()
    assert type(net.preconditioning) is kind
    D = net(x, SIGMA, torch.tensor([0, 1]))
    F_x, c = net.raw(x, SIGMA, torch.tensor([0, 1]))
    torch.testing.assert_close(D, c.c_skip * x + c.c_out * F_x)
    t = net.preconditioning.schedule.time(SIGMA)
    torch.testing.assert_close(
        c.c_noise.flatten().double(), net.preconditioning.schedule.label(t), rtol=1e-6, atol=1e-4
    )


def test_edm_preconditioning_of_a_schedule():
    sigma = torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    preconditioning = EDMOfSchedule(VP(), 0.5)
    c = preconditioning(sigma)
    torch.testing.assert_close(c.c_in**-2, sigma**2 + 0.25)
    y, n = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64).unbind()
    target = preconditioning.target(y, n, sigma)
    torch.testing.assert_close(c.c_skip * (y + sigma * n) + c.c_out * target, y)
    assert math.isclose(preconditioning.sigma_max, VP().sigma_max)
