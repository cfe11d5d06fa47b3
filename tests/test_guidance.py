"""Guidance of a network by itself, and the options of guidance."""

import json

import pytest
import torch
from conftest import fails_with, images_in, run_cli, tiny_network, tiny_uvit
from guidance_options import OPTIONS_OF_GUIDANCE

from generate_images import main as generate
from training.conditioning import Conditioning
from training.config.generation import GuidanceConfig, SamplingConfig
from training.config.samplers import GridConfig, SamplerConfig
from training.encoders import StandardRGBEncoder
from training.families import architecture_of
from training.guidance import GuidedDenoiser, Unconditional
from training.samplers import StackedRandomGenerator
from training.snapshot import save_network

NULL = 10  # number of the class that stands for none


def test_both_conventions_agree():
    """w = 1 + s, where the published scale s makes n_c + s (n_c - n_0) of the noise with and without a class."""
    net, scale, sigma = tiny_uvit(), 0.7, torch.tensor([0.3, 1.0, 4.0])
    x, classes = torch.randn(3, 1, 8, 8), torch.tensor([3, 1, 4])
    D = GuidedDenoiser(net, Unconditional(net), 1 + scale)(x, sigma, classes)
    column = sigma.reshape(-1, 1, 1, 1)
    with_class, without = ((x - net(x, sigma, c)) / column for c in (classes, torch.full([3], NULL)))
    torch.testing.assert_close(D, x - column * (with_class + scale * (with_class - without)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", [Conditioning.of_labels(10), Conditioning.of_text(4, 6)])
def test_a_network_guides_itself(conditioning):
    net = tiny_uvit(conditioning)
    sampler = SamplerConfig(grid=GridConfig(num_steps=3))
    contexts = torch.randn(3, 4, 6)

    def images(guide=None, weight=2.0):
        sampling = SamplingConfig(sampler=sampler, guidance=GuidanceConfig(guidance=weight))
        rnd = StackedRandomGenerator("cpu", range(3))
        generator = architecture_of(net).generator(net, sampling, None, guide)
        noise, classes = generator.noise(rnd), generator.condition(rnd)
        return generator(noise, contexts if conditioning.kind == "tokens" else classes, rnd)

    nulls = conditioning.null(3, "cpu")
    assert torch.equal(images(), images(lambda x, sigma, _: net(x, sigma, nulls)))
    assert not torch.allclose(images(), images(weight=1.0))


def test_generate_images(tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, tiny_uvit(), StandardRGBEncoder(), {})
    result = run_cli(
        generate,
        f"--net={path}",
        f"--outdir={tmp_path / 'out'}",
        "--seeds=0-1",
        "--steps=2",
        "--guidance=2",
        "--class=3",
    )
    assert result.exit_code == 0, result.output
    result = run_cli(generate, f"--net={path}", "--outdir=out", "--guidance=2", "--print-config")
    assert "--guidance=2" in result.output


@pytest.mark.parametrize("net", [tiny_network, lambda: tiny_uvit(null_class=False), lambda: tiny_uvit(Conditioning())])
def test_networks_that_know_no_images_without_a_condition(net, tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, net(), StandardRGBEncoder(), {})
    result = run_cli(generate, f"--net={path}", f"--outdir={tmp_path / 'out'}", "--guidance=1.4")
    fails_with(result, "--guidance=1.4 needs a guiding network: give --gnet", "knows no images without a condition")


def test_options_of_guidance(run, tmp_path):
    net, gnet = (run / f"network-snapshot-{name}.safetensors" for name in ("0000003-0.100", "0000001-0.050"))
    weights = tmp_path / "weights.txt"
    weights.write_text("0.1 3\n10 1\n")
    seen: dict[bytes, str] = {}
    for name, options in {"plain": ["--guidance=2"], **OPTIONS_OF_GUIDANCE}.items():
        options = [option.replace("WEIGHTS", str(weights)) for option in options]
        args = [f"--net={net}", f"--gnet={gnet}", "--seeds=0-1", "--sampler=euler", "--steps=6", *options]
        result = run_cli(generate, *args, f"--outdir={tmp_path / name}")
        assert result.exit_code == 0, result.output
        images = b"".join(image.tobytes() for image in images_in(tmp_path / name).values())
        assert images not in seen, (name, seen[images])
        seen[images] = name
        facts = json.loads((tmp_path / name / "generation.json").read_text())["sampler"]
        flags = [option.partition("=")[0] for option in options if not option.startswith("--guidance=")]
        assert {flag[2:].replace("-", "_") for flag in flags} <= facts.keys()
    assert json.loads((tmp_path / "table" / "generation.json").read_text())["sampler"]["guidance_table"] == [
        0.1,
        3,
        10,
        1,
    ]
