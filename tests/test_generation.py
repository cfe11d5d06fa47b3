"""Generation with any denoiser: here the exact one of a Gaussian mixture, which is no network."""

import pytest
import torch
from conftest import tiny_network

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.config.samplers import SOLVERS
from training.generation import generate_images
from training.metrics import calculate_metrics_from_stats, calculate_stats_for_iterable

SPEC = DataSpec(channels=1, resolution=4, conditioning=Conditioning(kind="classes", size=2))
MEANS, STD = torch.tensor([-0.5, 0.5]), 0.1


def mixture(x, sigma, cond=None):
    """E[y | x] for y ~ N(+-0.5, 0.1^2) in each pixel alike; a one-hot condition chooses the component."""
    sigma = torch.as_tensor(sigma).to(x.dtype).reshape(-1, 1, 1, 1)
    total = STD**2 + sigma**2
    each = [(STD**2 * x + sigma**2 * mean) / total for mean in MEANS]
    logp = torch.stack([-(x - mean).square().sum(dim=(1, 2, 3), keepdim=True) / (2 * total) for mean in MEANS])
    if cond is not None:
        logp = logp + cond.T.reshape(2, -1, 1, 1, 1).log()
    weights = logp.softmax(dim=0)
    return weights[0] * each[0] + weights[1] * each[1]


def generated(**kwargs):
    batches = generate_images(mixture, spec=SPEC, seeds=range(100), max_batch_size=64, verbose=False, **kwargs)
    images, labels = zip(*((r.images, r.labels) for r in batches), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "consistency"])  # a denoiser is no such model
def test_any_callable_is_sampled_by_every_solver(solver):
    images, labels = generated(solver=solver, num_steps=400 if solver == "pc" else 40)
    assert images.shape == (100, 1, 4, 4) and images.dtype == torch.uint8
    x = images.float() / 127.5 - 1
    means = MEANS[labels.argmax(1)].reshape(-1, 1, 1, 1)
    assert (x - means).abs().max() < 6 * STD
    assert (x - means).std().item() == pytest.approx(STD, rel=0.2)


def test_class_guide_and_measures():
    images, labels = generated(class_idx=1, num_steps=8, gnet=lambda x, sigma, cond=None: x * 0, guidance=1.5)
    assert (labels.argmax(1) == 1).all() and (images > 128).all()
    kwargs = dict(spec=SPEC, seeds=range(600), max_batch_size=600, num_steps=4, verbose=False)
    *_, last = calculate_stats_for_iterable(generate_images(mixture, **kwargs), ["fd_pixels"], verbose=False)
    results = calculate_metrics_from_stats(last.stats, last.stats, ["fd_pixels"], verbose=False)
    assert results["fd_pixels"] == pytest.approx(0, abs=1e-6)


def test_arguments_are_looked_at_before_anything_is_generated():
    with pytest.raises(UserError, match=r"no `spec`.*give spec=DataSpec"):
        generate_images(mixture)
    with pytest.raises(UserError, match="edm_sampler has no argument 'num_step'"):
        generate_images(mixture, spec=SPEC, num_step=3)
    with pytest.raises(UserError, match="--class=2 is out of range: the classes are 0 to 1"):
        generate_images(mixture, spec=SPEC, class_idx=2)
    with pytest.raises(UserError, match="--gnet has resolution 8, but --net has 4"):
        generate_images(mixture, tiny_network(), spec=SPEC)


def test_a_sampler_of_ones_own():
    def mean_of_zero(net, noise, labels, gnet, randn_like):
        return net(noise * 0, torch.tensor(100.0), labels)

    images, labels = generated(sampler_fn=mean_of_zero)
    expected = (MEANS[labels.argmax(1)] * 127.5 + 128).to(torch.uint8).reshape(-1, 1, 1, 1).expand_as(images)
    assert torch.equal(images, expected)
