"""Controls: what is known is in the result, what is not is left alone, and nothing else leaks."""

import pytest
import torch
from ideal import STD

from dnnlib.errors import UserError
from training.config.samplers import SOLVERS, GridConfig, SamplerConfig
from training.control import KnownGrey, KnownPixels
from training.samplers.noise import StackedRandomGenerator
from training.samplers.sampler import Sampler

SHAPE = (2, 3, 4, 4)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask() -> torch.Tensor:
    return (torch.arange(16).reshape(1, 1, 4, 4) % 3 == 0).float()


def no_draw(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("nothing must be drawn")


def smooth(x: torch.Tensor, sigma: torch.Tensor, cond=None) -> torch.Tensor:
    """A denoiser to which all pixels of an image matter."""
    shrunk = STD**2 / (STD**2 + sigma.to(x).reshape(-1, 1, 1, 1) ** 2) * x
    return (shrunk + shrunk.mean(dim=(1, 2, 3), keepdim=True)) / 2


def sampler_of(name: str) -> Sampler:
    """Of a solver and, where it follows an SDE, its schedule."""
    solver, _, schedule = name.partition(" ")
    grid = GridConfig(num_steps=30, schedule=schedule) if schedule else GridConfig(num_steps=8)
    return Sampler(SamplerConfig(solver=solver, grid=grid))


def run(name: str, control, seeds: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    """Samples of a solver under a control."""
    rnd = StackedRandomGenerator("cpu", seeds)
    noise = rnd.randn([len(seeds), *SHAPE[1:]])
    return sampler_of(name)(smooth, noise, randn_like=rnd.randn_like, after_update=control)


IN_TIME = ("pc", "rk45", "dpm-adaptive", "euler-maruyama")
ALL = [solver for solver in SOLVERS if solver not in IN_TIME]
ALL += [f"{solver} {schedule}" for solver in IN_TIME for schedule in ("ve", "vp", "subvp")]


def tolerance(name: str) -> float:
    """Some solvers end at the last time of an SDE, where a little noise is left."""
    return 4 * float(sampler_of(name).grid.sigmas[-1])


@pytest.mark.parametrize("name", ALL)
def test_known_pixels_are_in_the_result(name):
    images = normal(0)
    x = run(name, KnownPixels(images, mask()))
    known = mask().bool().expand(SHAPE)
    assert float((x - images)[known].abs().max()) <= tolerance(name)
    assert float((x - images)[~known].abs().min()) > 0
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_known_grey_is_in_the_result(name):
    grey = normal(0, (2, 1, 4, 4))
    x = run(name, KnownGrey(grey))
    torch.testing.assert_close(x.mean(dim=1, keepdim=True), grey, rtol=0, atol=tolerance(name) + 1e-5)
    assert float(x.std(dim=1).min()) > 0  # it has colours


@pytest.mark.parametrize("name", ALL)
def test_unknown_parts_are_never_looked_at(name):
    """Whatever is behind the mask, or in the colours, the result is the same, bit for bit."""
    images, other = normal(0), normal(1)
    known = mask().bool().expand(SHAPE)
    hidden = torch.where(known, images, torch.full(SHAPE, float("nan")))
    expected = run(name, KnownPixels(images, mask()))
    for behind in (torch.where(known, images, other), hidden):
        assert torch.equal(run(name, KnownPixels(behind, mask())), expected)
    colours = other - other.mean(dim=1, keepdim=True)
    grey = images.mean(dim=1, keepdim=True)
    torch.testing.assert_close(run(name, KnownGrey(grey + colours)), run(name, KnownGrey(grey)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_unknown_parts_see_the_known_ones_by_the_network(name):
    known = mask().bool().expand(SHAPE)
    dark, bright = (run(name, KnownPixels(torch.full(SHAPE, value), mask())) for value in (-1.0, 1.0))
    assert float((bright - dark)[~known].mean()) > 0.05


@pytest.mark.parametrize("name", ALL)
def test_controlled_samples_do_not_depend_on_their_batch(name):
    images = normal(0)
    together = run(name, KnownPixels(images, mask()))
    alone = run(name, KnownPixels(images[1:], mask()), seeds=(4,))
    torch.testing.assert_close(alone, together[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("control", [KnownPixels(normal(0), mask()), KnownGrey(normal(0))])
def test_clean_images_are_put_back_without_noise(control):
    x = normal(1)
    for sigma in (0.0, torch.zeros(()), torch.zeros(2)):
        once = control(x, sigma, no_draw)
        torch.testing.assert_close(control(once, sigma, no_draw), once)


def test_noise_of_known_pixels():
    """Of the level of each image; unknown pixels are left as they are."""
    images, x = normal(0, (2, 1, 200, 200)), normal(1, (2, 1, 200, 200))
    half = torch.zeros(1, 1, 200, 200)
    half[..., :100] = 1
    out = KnownPixels(images, half)(x, torch.tensor([0.5, 20.0]), torch.randn_like)
    assert torch.equal(out[..., 100:], x[..., 100:])
    noise = (out - images)[..., :100].flatten(1)
    torch.testing.assert_close(noise.std(dim=1), torch.tensor([0.5, 20.0]), rtol=0.02, atol=0)


def test_noise_of_known_grey():
    """Of standard deviation sigma along (1, 1, 1) / sqrt(3); colours at right angles to it are left as they are."""
    images, x = normal(0, (2, 3, 200, 200)), normal(1, (2, 3, 200, 200))
    out = KnownGrey(images)(x, torch.tensor([0.5, 20.0]), torch.randn_like)
    along = (out - images).sum(dim=1) / 3**0.5
    torch.testing.assert_close(along.flatten(1).std(dim=1), torch.tensor([0.5, 20.0]), rtol=0.02, atol=0)
    for t in (out, x):
        t -= t.mean(dim=1, keepdim=True)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-4)


def test_one_image_for_all():
    one = KnownPixels(normal(0)[:1], mask())(normal(1), 0.0, no_draw)
    each = KnownPixels(normal(0)[:1].expand(SHAPE), mask())(normal(1), 0.0, no_draw)
    assert torch.equal(one, each)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: KnownPixels(normal(0), torch.ones(1, 1, 5, 5)), "does not fit"),
        (lambda: KnownPixels(normal(0), mask() / 2), "1 where pixels are known and 0 elsewhere"),
        (lambda: KnownGrey(normal(0, (2, 4, 4, 4))), "1 or 3 channels"),
    ],
)
def test_bad_controls(make, fragment):
    with pytest.raises(UserError, match=fragment):
        make()
