"""Consistency sampling: what it visits, and where it arrives."""

import pytest
import torch

from dnnlib.errors import UserError
from training.config.samplers import GridConfig, SamplerConfig
from training.samplers.grids import grid_for
from training.samplers.noise import StackedRandomGenerator
from training.samplers.sampler import Sampler

STD = 0.5


def of_gaussian(x, sigma, labels=None):
    """The end of the path of the probability flow through x, of data distributed as N(0, STD^2)."""
    return x * STD / (STD**2 + sigma.to(x) ** 2).sqrt()


def config(*levels: float) -> SamplerConfig:
    return SamplerConfig(solver="consistency", grid=GridConfig(sigmas=levels))


@pytest.mark.parametrize("levels", [(20.0,), (20.0, 0.8), (80.0, 5.0, 1.0, 0.2)])
def test_the_exact_model_gives_the_distribution_by_any_steps(levels):
    torch.manual_seed(0)
    sampler = Sampler(config(*levels))
    x = sampler(of_gaussian, torch.randn(40_000, 1, 1, 1))
    assert sampler.nfe == len(levels)
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.02)


def test_each_level_begins_from_the_image_and_fresh_noise():
    seen, updates = [], []

    def D(x, sigma, labels=None):
        seen.append((x.clone(), sigma.item()))
        return x / 2

    noise, drawn = torch.ones(1, 1, 2, 2), iter([torch.full([1, 1, 2, 2], 3.0), torch.full([1, 1, 2, 2], 5.0)])
    x = Sampler(config(8.0, 2.0, 1.0))(
        D, noise, randn_like=lambda _x: next(drawn), after_update=lambda x, sigma, _: updates.append(sigma.item()) or x
    )
    assert [sigma for _, sigma in seen] == [8, 2, 1] and updates == [2, 1, 0]
    assert [image.flatten()[0].item() for image, _ in seen] == [8, 4 + 2 * 3, 5 + 1 * 5]
    assert (x == 5).all()


def test_noise_depends_on_the_seed_alone():
    def run(seeds):
        rnd = StackedRandomGenerator("cpu", seeds)
        return Sampler(config(20.0, 0.8))(of_gaussian, rnd.randn([len(seeds), 1, 1, 1]), randn_like=rnd.randn_like)

    assert torch.equal(run([3, 4, 5])[1:2], run([4]))


def test_the_sampler_says_its_levels():
    facts = Sampler(config(20.0, 0.8)).describe()
    assert facts == {"solver": "consistency", "sigmas": [20.0, 0.8], "sigma_min": 0.8, "sigma_max": 20.0}
    assert Sampler(SamplerConfig(solver="consistency")).describe() == facts


def test_levels_are_checked():
    for levels, message in [
        ((0.8, 20.0), "--sigmas=0.8,20.0: noise levels must fall"),
        ((2.0, 2.0), "must fall"),
        ((1.0, 0.0), "--sigmas must be positive"),
        ((), "--sigmas must have 1 to 10000 values"),
    ]:
        with pytest.raises(UserError, match=message):
            config(*levels)

    class Limited:
        sigma_min, sigma_max = 0.01, 10.0

    with pytest.raises(UserError, match="--sigmas=20 is beyond the noise levels of the network, 0.01 to 10"):
        grid_for(config(20.0, 0.8), Limited())
    assert grid_for(SamplerConfig(solver="consistency"), Limited()).sigmas.tolist() == [10, 0.8, 0]


@pytest.mark.parametrize("name", ["steps", "sigma_min", "sigma_max", "rho", "spacing", "schedule", "S_churn", "rtol"])
def test_other_options_have_no_effect(name):
    assert config(20.0, 0.8).without_effect([name]) == [f"--{name}"]
