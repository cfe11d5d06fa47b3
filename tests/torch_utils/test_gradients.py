"""Gradients in one vector, and parameters with the channels last."""

import pytest
import torch

from torch_utils.gradients import channels_last_views, flat_gradients, norm_of, use_channels_last


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1, bias=False))


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_vector_holds_all_gradients(channels_last):
    net, other = network(), network()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if channels_last:
        use_channels_last(net)
    flat = flat_gradients(net.parameters())
    assert flat.shape == (sum(p.numel() for p in net.parameters()),) and not flat.any()
    for model in (net, other):
        model(images).square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.stride() == p.stride()
    flat.zero_()
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


def test_frozen_parameters_take_no_place():
    net = network()
    net[0].requires_grad_(False)
    assert flat_gradients(net.parameters()).numel() == net[1].weight.numel()
    assert net[0].weight.grad is None


def test_views_are_contiguous_and_shared():
    net = network()
    use_channels_last(net)
    flat_gradients(net.parameters()).fill_(1)
    net[0].bias.grad = None
    views = channels_last_views(net.parameters())
    assert [tuple(view.shape) for view in views] == [(4, 3, 3, 3), (2, 1, 1, 4)]
    for view, p in zip(views, (net[0].weight, net[1].weight), strict=True):
        assert view.is_contiguous() and view.grad is not None and view.grad.is_contiguous()
        view.sub_(view.grad)
        assert torch.equal(p.detach().permute(0, 2, 3, 1), view)


def test_norms_of_long_vectors_keep_their_digits():
    """Added up one by one, the squares of so many numbers lose the fourth digit."""
    vector = torch.randn(15_000_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert norm_of(vector).item() == pytest.approx(
        torch.linalg.vector_norm(vector, dtype=torch.float64).item(), rel=1e-5
    )
