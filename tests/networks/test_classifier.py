"""The classifier of noisy images: shapes, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from dnnlib.errors import UserError
from training.networks.classifier import NoiseConditionalWRN, standardised

TINY = {"img_channels": 1, "num_classes": 2, "depth": 10, "width": 1, "nf": 8, "mean": (0.5,), "std": (0.25,)}


def test_published_size():
    """WRN-28-10 has 36.5 M parameters; the embedding's layers come on top, 512 (2 x 128 + 512 + sum of widths)."""
    with torch.device("meta"):
        net = NoiseConditionalWRN()
    widths = [160 * 2**group for group in range(3) for _ in range(4)]
    convs = 3 * 16 * 9 + sum(9 * (i + o) * o for i, o in zip([16, *widths], widths, strict=False))
    assert sum(p.numel() for n, p in net.named_parameters() if "conv" in n) == convs
    assert len(net.blocks) == 12
    embedding = sum(p.numel() for n, p in net.named_parameters() if "emb" in n)
    assert embedding == 257 * 512 + 513 * 512 + 513 * sum(widths)


def test_logits():
    torch.manual_seed(0)
    net = NoiseConditionalWRN(depth=10, width=1, nf=8).eval()
    x = torch.rand(3, 3, 16, 16)
    logits = net(x, torch.tensor([0.1, 1.0, 10.0]))
    assert logits.shape == (3, 10) and logits.dtype == torch.float32 and logits.isfinite().all()
    torch.testing.assert_close(net(x[1:2], torch.tensor([1.0])), logits[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x, torch.tensor(1.0)), net(x, torch.full([3], 1.0)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x[:1], torch.tensor([2.0])), logits[:1])


def test_images_are_standardised():
    x = torch.rand(2, 3, 4, 4) * 7 - 2
    y = standardised(x)
    torch.testing.assert_close(y.mean(dim=(1, 2, 3)), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.square().mean(dim=(1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(standardised(torch.full([1, 3, 4, 4], 0.3)), torch.zeros(1, 3, 4, 4))


def test_it_learns_to_tell_noisy_images_apart():
    torch.manual_seed(0)
    net = NoiseConditionalWRN(**TINY)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

    def batch(n: int):
        classes = torch.randint(2, [n])
        images = torch.zeros(n, 1, 8, 8)
        images[classes == 0, :, :, :4] = 1
        images[classes == 1, :, :4] = 1
        sigma = torch.rand(n) + 0.1
        return images + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(images), sigma, classes

    for _ in range(40):
        x, sigma, classes = batch(64)
        optimizer.zero_grad()
        F.cross_entropy(net(x, sigma), classes).backward()
        optimizer.step()
    x, sigma, classes = batch(256)
    with torch.no_grad():
        accuracy = (net.eval()(x, sigma).argmax(dim=1) == classes).float().mean()
    assert float(accuracy) > 0.9


@pytest.mark.parametrize(
    ("options", "fragment"), [({"depth": 12}, "depth"), ({"depth": 4}, "depth"), ({"mean": (0.5, 0.5)}, "mean and std")]
)
def test_bad_options(options, fragment):
    with pytest.raises(UserError, match=fragment):
        NoiseConditionalWRN(**options)
