"""What holds for every architecture of the registry, and so for every new one."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_dataset, png, run_cli

from dnnlib.errors import UserError
from training.conditioning import DataSpec
from training.config.fields import all_fields
from training.config.generation import SamplingConfig
from training.config.guidance import METHODS, GuidanceConfig
from training.config.samplers import SCHEDULES, SIGMA_MAX, SIGMA_MIN, SOLVERS, GridConfig, SamplerConfig
from training.encoders import StandardRGBEncoder
from training.families import ARCHITECTURES, architecture_name, architecture_of, preset_network, trained_by
from training.flops import count_operations, count_parameters
from training.samplers import StackedRandomGenerator
from training.snapshot import load_network, save_network

TRAINED = [name for name, architecture in ARCHITECTURES.items() if architecture.training is not None]
GENERATORS = [name for name in TRAINED if ARCHITECTURES[name].makes_images]
DENOISERS = [name for name in GENERATORS if ARCHITECTURES[name].is_denoiser]
# Of hundreds of layers, which take seconds to make.
DEEP = ("nvae-celeba64", "nvae-imagenet32", "nvae-celeba256", "nvae-ffhq256")
PRESETS = [
    pytest.param(name, preset, marks=[pytest.mark.slow] * (preset in DEEP))
    for name in ARCHITECTURES
    for preset in ARCHITECTURES[name].presets
]


def digits_preset(name: str) -> str:
    """The family's preset for the digits; each one has one."""
    return next(preset for preset in ARCHITECTURES[name].presets if preset.startswith("digits"))


def small_network(name: str) -> torch.nn.Module:
    """A small network of a family, whose output is not zero."""
    torch.manual_seed(0)
    net = preset_network(ARCHITECTURES[name].presets[digits_preset(name)])
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=GENERATORS)
def net(request) -> torch.nn.Module:
    return small_network(request.param)


@pytest.fixture(scope="module", params=DENOISERS)
def denoiser(request) -> torch.nn.Module:
    return small_network(request.param)


def images_and_conditions(spec: DataSpec, n: int = 4) -> tuple[torch.Tensor, torch.Tensor | None]:
    rnd = StackedRandomGenerator("cpu", range(n))
    return rnd.randn([n, *spec.shape]), spec.conditioning.draw(rnd, n)


def test_names(net):
    assert architecture_of(net) is ARCHITECTURES[architecture_name(net)]
    with pytest.raises(UserError, match="a Linear is no network of this project"):
        architecture_name(torch.nn.Linear(1, 1))


def test_a_clean_image_stays(denoiser):
    x, cond = images_and_conditions(denoiser.spec)
    torch.testing.assert_close(denoiser(x, torch.tensor(1e-4), cond), x, rtol=0, atol=1e-3)


def test_batch_neighbours_do_not_matter(denoiser):
    net = denoiser
    x, cond = images_and_conditions(net.spec)
    sigma = torch.tensor([0.1, 1.0, 5.0, 0.5])
    together = net(x * sigma.reshape(-1, 1, 1, 1), sigma, cond)
    for i in range(len(x)):
        alone = net(x[i : i + 1] * sigma[i], sigma[i : i + 1], None if cond is None else cond[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(together, net(x * sigma.reshape(-1, 1, 1, 1), sigma, cond))


@pytest.mark.parametrize("sigma", [SIGMA_MIN, SIGMA_MAX])
def test_both_ends_of_the_noise_range_are_finite(denoiser, sigma):
    x, cond = images_and_conditions(denoiser.spec)
    assert denoiser(x * sigma, torch.tensor(sigma), cond).isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_samples(denoiser, solver):
    steps = 24 if SOLVERS[solver].grid == "times" else 4  # VP has rates of up to 20, and a step takes rate / steps
    check_samples(denoiser, SamplingConfig(sampler=SamplerConfig(solver=solver, grid=GridConfig(num_steps=steps))))


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_of_guidance_samples(denoiser, method):
    """With another network as the guide; networks that know images without a condition need none."""
    guide = small_network(architecture_name(denoiser))
    for parameter in guide.parameters():
        parameter.mul_(0.9)
    sampler = SamplerConfig(solver="euler", grid=GridConfig(num_steps=4))
    guidance = GuidanceConfig(guidance=0.8, guidance_method=method)
    images = check_samples(denoiser, SamplingConfig(sampler=sampler, guidance=guidance), guide)
    assert not torch.equal(images, check_samples(denoiser, SamplingConfig(sampler=sampler)))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "network"])
def test_every_schedule_is_followed(denoiser, schedule):
    check_samples(
        denoiser, SamplingConfig(sampler=SamplerConfig(solver="pc", grid=GridConfig(num_steps=24, schedule=schedule)))
    )


def test_images_without_options(net):
    check_samples(net, SamplingConfig(sampler=SamplerConfig(grid=GridConfig(num_steps=2))))


def check_samples(net: torch.nn.Module, sampling: SamplingConfig, guide: torch.nn.Module | None = None) -> torch.Tensor:
    """Images depend on their seeds alone, are finite, and say what made them."""
    generator = architecture_of(net).generator(net, sampling, batch_size=4, guide=guide)
    together, alone = (StackedRandomGenerator("cpu", seeds) for seeds in ([3, 4, 5], [4]))
    images = generator(generator.noise(together), generator.condition(together), together)
    assert images.shape == (3, *net.spec.shape) and images.isfinite().all()
    single = generator(generator.noise(alone), generator.condition(alone), alone)
    torch.testing.assert_close(images[1:2], single, rtol=1e-3, atol=1e-3)
    json.dumps(generator.describe(), allow_nan=False)
    return images


def test_snapshot_round_trip(net, tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, net, StandardRGBEncoder(), {"nimg": 1000}, dtype=torch.float32)
    loaded = load_network(path).net
    assert loaded.spec == net.spec
    sampling = SamplingConfig(sampler=SamplerConfig(grid=GridConfig(num_steps=2)))
    assert torch.equal(check_samples(loaded, sampling), check_samples(net, sampling))


HOSTILE = (None, -1, 0.5, math.nan, math.inf, 10**9, "x", [], [10**9], [None] * 9, [[1]], {}, True, "y" * 9999)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hostile_values_of_every_field_are_refused(name):
    network, taken = ARCHITECTURES[name].network, []
    for field in all_fields(network):
        for value in HOSTILE:
            try:
                taken.append((field.name, getattr(dataclasses.replace(network(), **{field.name: value}), field.name)))
            except UserError:
                continue
    kinds = {field.name: field.type for field in all_fields(network)}
    for name, value in taken:  # what is not refused is of the right type, and no larger than a network can be
        numbers = value if isinstance(value, tuple) else [] if value is None else [value]
        if kinds[name] is float:
            assert all(math.isfinite(number) for number in numbers), (name, value)
        else:
            assert all(type(number) in (int, float, bool) and abs(number) < 10**9 for number in numbers), (name, value)
    assert len(taken) < len(all_fields(network)) * len(HOSTILE) / 3
    with pytest.raises(UserError, match="unknown option 'bogus'"):
        network.from_json({"bogus": 1})


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_are_complete_and_go_to_json_and_back(name, preset):
    architecture = ARCHITECTURES[name]
    config = architecture.presets[preset].config
    assert type(config) is architecture.training and trained_by(config) is architecture
    assert type(config).from_flat(config.flat()) == config
    for part in (config.network, config.objective, config.optimizer, config.ema, config.run):
        assert type(part).from_json(json.loads(json.dumps(part.to_json()))) == part
    with torch.device("meta"):
        net = preset_network(architecture.presets[preset])
        operations = count_operations(net.eval(), architecture.inputs(net, 1, "meta"))
    assert net.spec.resolution == architecture.presets[preset].resolution
    assert count_parameters(net) > 1000
    assert sum(operations.values()) > count_parameters(net)


@pytest.fixture(scope="module", params=TRAINED)
def training(request, tmp_path_factory):
    """A family's name, its command, and options of a run of two steps on random images."""
    name, folder = request.param, tmp_path_factory.mktemp("training")
    preset = ARCHITECTURES[name].presets[digits_preset(name)]
    rng = np.random.default_rng(0)
    shape = [preset.resolution, preset.resolution] + [preset.channels] * (preset.channels > 1)
    files = {f"{i}.png": png(rng.integers(0, 256, shape, dtype=np.uint8)) for i in range(40)}
    data = make_dataset(folder / "data.zip", files, {file: i % max(preset.classes, 1) for i, file in enumerate(files)})
    intervals = ["--batch=512", "--status=512", "--snapshot=1024", "--checkpoint=1024", "--device=cpu"]
    options = [f"--data={data}", f"--preset={digits_preset(name)}", *intervals]
    command = importlib.import_module(f"train_{ARCHITECTURES[name].training.family}").main
    return name, command, options, folder


def newest_state(run: Path) -> dict:
    return torch.load(max(run.glob("training-state-*.pt")), weights_only=True)


def test_two_steps_and_an_exact_resume(training):
    name, command, options, folder = training
    for run, durations in [("whole", [1024]), ("parts", [512, 1024])]:
        for duration in durations:
            result = run_cli(command, f"--outdir={folder / run}", *options, f"--duration={duration}")
            assert result.exit_code == 0, result.output
    whole, parts = newest_state(folder / "whole"), newest_state(folder / "parts")
    assert whole["nimg"] == parts["nimg"] == 1024
    for key, value in whole["net"].items():
        assert torch.equal(parts["net"][key], value), key
    snapshots = sorted((folder / "whole").glob("network-snapshot-*.safetensors"))
    assert snapshots
    net = load_network(snapshots[-1]).net
    assert architecture_name(net) == name
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_help_and_dry_run(training):
    name, command, options, folder = training
    text = run_cli(command, "--help").output
    for field in all_fields(ARCHITECTURES[name].training):
        assert field.option.flag is None or field.flag in text
    result = run_cli(command, f"--outdir={folder / 'dry'}", *options, "-n")
    assert "Dry run; exiting." in result.output and not (folder / "dry").exists()
