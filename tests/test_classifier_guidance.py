"""Guidance by a classifier of noisy images: its gradient, what it asks for, and what does not go together."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DIGITS, fails_with, images_in, run_cli

import generate_images
import train_classifier
from training.conditioning import Conditioning, DataSpec
from training.config.classifier import CLASSIFIER_PRESETS
from training.config.guidance import GuidanceConfig
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.guidance import ClassifierGuided, weight_of
from training.losses import ClassifierLoss
from training.networks.classifier import NoisyClassifier
from training.networks.score_sde import ScoreSDE
from training.provenance import read_png_text
from training.samplers import StackedRandomGenerator
from training.snapshot import save_network

SMALL = dict(depth=10, width=1, nf=4, fourier_scale=1.0)
MEANS = torch.tensor([-0.6, 0.8])


class TwoGaussians:
    """p(class | x, sigma) of points of two classes at two places, in closed form; all dimensions are alike."""

    sigma_min, sigma_max = 0.01, 10.0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        distance = (x.flatten(1)[:, None] - MEANS[:, None]).square().sum(dim=2)
        return -distance / (2 * sigma.reshape(-1, 1) ** 2)


def posterior_mean(x: torch.Tensor, sigma: torch.Tensor, _labels: torch.Tensor | None = None) -> torch.Tensor:
    weights = TwoGaussians()(x, sigma).softmax(dim=1)
    return (weights @ MEANS).reshape(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_weight_1_is_the_denoiser_of_the_class(mode):
    """Bayes: the score of the class is that of all and the gradient of the classifier, whose weight is then 1."""
    labels = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0]), 2).float()
    with mode():
        x, sigma = torch.randn([4, 1, 1, 1], generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.5, 2, 5])
        guided = ClassifierGuided(posterior_mean, TwoGaussians(), 1.0, (0.0, math.inf))
        torch.testing.assert_close(guided(x, sigma, labels).flatten(), labels @ MEANS, rtol=0, atol=1e-4)
        double = ClassifierGuided(posterior_mean, TwoGaussians(), 2.0, (0.0, math.inf))(x, sigma, labels)
        plain = posterior_mean(x, sigma)
        torch.testing.assert_close(double.flatten(), (2 * labels @ MEANS - plain.flatten()), rtol=0, atol=1e-4)


def test_where_it_does_not_act():
    labels, x = torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.zeros(4, 1, 1, 1)
    sigma = torch.tensor([0.005, 0.5, 5.0, 20.0])  # beyond the classifier's, within both, outside the interval, beyond
    plain = posterior_mean(x, sigma)
    guided = ClassifierGuided(posterior_mean, TwoGaussians(), 2.0, (0.0, 1.0))
    assert (guided(x, sigma, labels) != plain).flatten().tolist() == [False, True, False, False]
    assert torch.equal(guided(x, sigma, None), plain)
    without = ClassifierGuided(posterior_mean, TwoGaussians(), 0.0, (0.0, math.inf))
    assert torch.equal(without(x, sigma, labels), plain)


def test_a_weight_for_each_noise_level():
    """From 2 at 0.1 to none at 10, the weight that is no guidance by a classifier."""
    config = GuidanceConfig(guidance=2.0, guidance_schedule="linear", guidance_ramp=(0.1, 10.0))
    labels, x = torch.tensor([[1.0, 0.0]]).repeat(3, 1), torch.full([3, 1, 1, 1], 0.3)
    sigma = torch.tensor([0.1, 1.0, 10.0])
    found = ClassifierGuided(posterior_mean, TwoGaussians(), weight_of(config, none=0.0))(x, sigma, labels)
    for i, weight in enumerate((2.0, 1.0, 0.0)):
        alone = ClassifierGuided(posterior_mean, TwoGaussians(), weight)(x[:1], sigma[i], labels[:1])
        torch.testing.assert_close(found[i : i + 1], alone)
    assert config.describe(by_classifier=True)["guidance_end"] == 0


def classifier(classes: int = 10, resolution: int = 8, channels: int = 1, **arguments) -> NoisyClassifier:
    torch.manual_seed(0)
    data = DataSpec(channels=channels, resolution=resolution, conditioning=Conditioning.of_labels(classes))
    return NoisyClassifier(data, **{**SMALL, **arguments}).eval().requires_grad_(False)


def test_loss_sees_all_noise_levels():
    net, levels = classifier(sigma_min=0.02, sigma_max=20.0), []
    net.register_forward_pre_hook(lambda _net, args: levels.append(args[1]))
    rnd = StackedRandomGenerator("cpu", range(2000))
    labels = torch.nn.functional.one_hot(torch.arange(2000) % 10, 10).float()
    loss = ClassifierLoss()
    assert loss.report() == {}
    assert loss(net, torch.zeros(2000, 1, 8, 8), labels, rnd=rnd).shape == (2000,)
    uniform = (levels[0].log() - math.log(0.02)) / math.log(1000)
    assert uniform.min() >= 0 and uniform.max() <= 1
    assert torch.histc(uniform, 10).min() > 150
    assert 0 <= loss.report()["accuracy"] < 0.3


def test_pixels_are_seen_alike_in_both_ranges():
    centred, other = classifier(centered=True), classifier(centered=False)
    other.load_state_dict(centred.state_dict())
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 4.0])
    torch.testing.assert_close(centred(x, sigma), other((x + 1) / 2, sigma / 2), rtol=1e-4, atol=1e-5)
    assert centred.spec.pixel_range == (-1, 1) and other.spec.pixel_range == (0, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier trained for a few seconds."""
    outdir = tmp_path_factory.mktemp("classifier") / "run"
    options = ["--preset=digits-classifier", "--duration=12800", "--decay-from=6400", "--decay-to=12800"]
    options += ["--warmup=640", "--status=6400", "--nf=4", "--device=cpu"]
    result = run_cli(train_classifier.main, f"--outdir={outdir}", f"--data={DIGITS}", *options)
    assert result.exit_code == 0, result.output
    return outdir


@pytest.fixture
def score_net(tmp_path):
    """A small VP network of the digits, whose pixels are Gaussian as far as it knows."""
    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), fir=False, embedding_type="positional"
    )
    vp: dict[str, Any] = dict(sde="vp", scale_by_sigma=False, centered=True)
    net = ScoreSDE(DataSpec(channels=1, resolution=8), **small, **vp)
    path = tmp_path / "vp.safetensors"
    save_network(path, net, StandardRGBEncoder(), {})
    return path


def test_images_of_a_class(trained, score_net, tmp_path):
    """A classifier that was trained knows digits, and images are what it asks for; the files say what made them."""
    fields = [json.loads(line) for line in (trained / "stats.jsonl").read_text().splitlines()]
    assert fields[-1]["accuracy"] > fields[0]["accuracy"] > 0.15
    guide = trained / "network-snapshot-0000012-ema.safetensors"
    options = [f"--net={score_net}", f"--classifier={guide}", "--seeds=0-3", "--steps=6", "--sampler=euler"]
    options += ["--sigma_max=1", "--guidance=10"]  # the network denoises nothing, and what is beyond black is black
    images = {}
    for name, chosen in [("3", ["--class=3"]), ("7", ["--class=7"]), ("none", ["--class=3", "--guidance=0"])]:
        result = run_cli(generate_images.main, *options, *chosen, f"--outdir={tmp_path / name}")
        assert result.exit_code == 0, result.output
        images[name] = images_in(tmp_path / name)
    for other in ("7", "none"):
        assert any((images["3"][file] != images[other][file]).any() for file in images["3"])
    facts = read_png_text(tmp_path / "3" / "000000.png") or {}
    assert facts["classifier"] == str(guide) and len(facts["classifier_sha256"]) == 64
    assert facts["class"] == 3 and facts["sampler"]["guidance"] == 10
    alone = run_cli(generate_images.main, *options, "--class=3", "--batch=1", f"--outdir={tmp_path / 'alone'}")
    assert alone.exit_code == 0
    for file, image in images_in(tmp_path / "alone").items():
        assert np.abs(image.astype(int) - images["3"][file]).max() <= 1


def saved(path, net: NoisyClassifier):
    save_network(path, net, StandardRGBEncoder(*net.spec.pixel_range), {})
    return path


def test_what_does_not_go_together(score_net, run, tmp_path):
    def fails(*fragments: str, options=(), net=score_net, guide=None) -> None:
        args = [f"--net={net}", f"--outdir={tmp_path / 'out'}", *options]
        fails_with(run_cli(generate_images.main, *args, *([f"--classifier={guide}"] if guide else [])), *fragments)

    good = saved(tmp_path / "good.safetensors", classifier())
    fails(
        "--class=3 is out of range: the classes are 0 to 1",
        options=["--class=3"],
        guide=saved(tmp_path / "2.safetensors", classifier(2)),
    )
    fails(
        "--classifier has resolution 16, but --net has 8",
        guide=saved(tmp_path / "r.safetensors", classifier(resolution=16)),
    )
    fails("number of channels 3, but --net has 1", guide=saved(tmp_path / "c.safetensors", classifier(channels=3)))
    fails("range of pixels (0.0, 1.0)", guide=saved(tmp_path / "p.safetensors", classifier(centered=False)))
    fails("holds a ScoreSDE, which is no classifier of noisy images", guide=score_net)
    fails("--guidance-method=apg combines two networks", options=["--guidance-method=apg"], guide=good)
    fails("--classifier and --gnet both say what guides", options=[f"--gnet={score_net}"], guide=good)
    fails("holds a NoisyClassifier, which makes no images", net=good)
    conditional = run / "network-snapshot-0000003-0.100.safetensors"
    fails("--classifier is for networks that know no conditions", net=conditional, guide=good)
    assert not (tmp_path / "out").exists()


def test_what_a_classifier_is_not_trained_for(tmp_path):
    args = [f"--outdir={tmp_path / 'x'}", f"--data={DIGITS}", "--preset=digits-classifier", "-n"]
    for option, message in [
        ("--cond=0", "a classifier learns classes"),
        ("--preview=4Ki", "--preview: a classifier makes no images"),
        ("--sigma-min=200", "--sigma-min=200 must be below --sigma-max=20"),
        ("--depth=11", "depth must be 6 n + 4"),
    ]:
        fails_with(run_cli(train_classifier.main, *args, option), message)


def test_presets_have_the_published_network():
    with torch.device("meta"):
        net = preset_network(CLASSIFIER_PRESETS["cifar10-classifier-ve"]).net
    assert [block.conv1.weight.shape[0] for block in net.blocks] == [160] * 4 + [320] * 4 + [640] * 4
