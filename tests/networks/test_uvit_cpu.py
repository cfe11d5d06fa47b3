"""The rewritten U-ViT computes what the U-ViT computes."""

import pytest
import torch

from training.conditioning import Conditioning, DataSpec
from training.families import accelerated
from training.networks import uvit_cpu
from training.networks.uvit_denoiser import UViTDenoiser

KINDS = {
    "none": Conditioning(),
    "classes": Conditioning.of_labels(3),
    "text": Conditioning.of_text(4, 6),
}


def denoiser(kind: str, precision: str = "fp32", **arguments) -> UViTDenoiser:
    torch.manual_seed(0)
    data = DataSpec(channels=2, resolution=8, conditioning=KINDS[kind])
    return UViTDenoiser(data, precision, embed_dim=32, depth=3, num_heads=2, **arguments).eval().requires_grad_(False)


def inputs(net: UViTDenoiser, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rnd = torch.Generator().manual_seed(n)
    conditioning = net.spec.conditioning
    cond = None if conditioning.kind == "none" else torch.rand(n, *conditioning.shape, generator=rnd)
    return torch.randn(n, 2, 8, 8, generator=rnd), torch.linspace(0.1, 5, n), cond


@pytest.mark.parametrize("arguments", [{}, {"qkv_bias": True, "skip_norm": True}, {"skip": False, "conv": False}])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_same_numbers(kind, arguments):
    net = denoiser(kind, **arguments)
    fast = uvit_cpu.with_packed_weights(net, 2)
    for n in (2, 1, 5):  # also those that the layout was not chosen for
        torch.testing.assert_close(fast(*inputs(net, n)), net(*inputs(net, n)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@torch.inference_mode()
def test_in_other_precisions(precision):
    net = denoiser("classes", precision)
    fast = accelerated(net, 2)
    exact = denoiser("classes")(*inputs(net, 2))
    assert (fast(*inputs(net, 2)) - exact).norm() <= 2 * (net(*inputs(net, 2)) - exact).norm() + 1e-4 * exact.norm()


def test_later_changes_of_the_network_are_not_followed():
    net = denoiser("none")
    fast = accelerated(net, 2)
    before = fast(*inputs(net, 2))
    for p in net.parameters():
        p.zero_()
    assert torch.equal(fast(*inputs(net, 2)), before)
    assert not torch.equal(net(*inputs(net, 2)), before)


def test_without_the_private_operators_the_network_stays_as_it_is(monkeypatch):
    def missing(*_args, **_kwargs):
        raise AttributeError("no such operator")

    monkeypatch.setattr(uvit_cpu.PackedLinear, "__init__", missing)
    uvit_cpu.can_pack.cache_clear()
    try:
        net = denoiser("classes")
        assert accelerated(net, 2) is net
    finally:
        uvit_cpu.can_pack.cache_clear()
