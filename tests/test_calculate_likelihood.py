"""calculate_likelihood.py: every option, sharing, resuming, and bad input."""

import dataclasses
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, assert_all_options, fails_with, make_dataset, png, random_images, run_cli, torchrun

from calculate_likelihood import main as calculate
from training.conditioning import DataSpec
from training.config.edm2 import TRAINING_PRESETS as EDM2_PRESETS
from training.config.likelihood import FIRST_TIME, FlowLikelihoodConfig
from training.config.samplers import SamplerConfig
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.uvit_presets import UVIT_PRESETS
from training.dataset.images import ImageFolderDataset
from training.dataset_likelihood import summarize
from training.denoiser import schedule_of
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.families import preset_network
from training.likelihood import FlowLikelihood
from training.samplers import StackedRandomGenerator
from training.samplers.grids import ode_grid
from training.samplers.sampler import Sampler
from training.snapshot import load_network, save_network


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The first digits, without their labels."""
    with zipfile.ZipFile(DIGITS) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")][:11]
        files = {name: archive.read(name) for name in names}
    return make_dataset(tmp_path_factory.mktemp("data") / "digits.zip", files)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(nvae, images, out, *options):
    result = run_cli(calculate, f"--net={nvae}", f"--data={images}", f"--out={out}", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_all_options(nvae, images, tmp_path):
    out = tmp_path / "folder" / "likelihood.jsonl"
    options = ["--num=5", "--seed=3", "--batch=2", "--samples=4", "--max-batch=6", "--precision=fp32", "--device=cpu"]
    summary = run(nvae, images, out, *options, "--offline")
    flow = [
        "--trace=exact",
        "--rtol=1",
        "--atol=1",
        "--common-norm=0",
        "--repeats=1",
        "--levels=17",
        "--dequantization=none",
    ]
    args = [
        f"--net={nvae}",
        f"--data={images}",
        f"--out={out}",
        *options,
        "--offline",
        *flow,
        "--schedule=ve",
        "--arch=x",
        "--latents=x",
    ]
    assert_all_options(calculate, args)
    facts, *rows, last = lines_of(out)
    assert facts["facts"]["samples"] == 4 and facts["facts"]["levels"] == 17 and facts["facts"]["dims"] == 64
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4] and last["summary"] == summary == summarize(rows)
    groups = [f"kl_{i:02d}" for i in range(3)]
    for row in rows:
        assert row["nelbo"] == pytest.approx(row["recon"] + sum(row[name] for name in groups))
        assert row["bits_per_dim"] == pytest.approx(row["iw_bound"] / 64 / 0.6931472)


def test_an_image_depends_on_itself_alone_and_a_rest_is_computed(nvae, images, tmp_path):
    run(nvae, images, tmp_path / "whole.jsonl", "--samples=3", "--batch=11")
    whole = {row["index"]: row for row in lines_of(tmp_path / "whole.jsonl") if "index" in row}
    out = tmp_path / "parts.jsonl"
    run(nvae, images, out, "--samples=3", "--num=4", "--batch=3")
    text = out.read_text()
    damaged = '\xff\n{"index": 5}\n{"index": 6, "bits_per_dim": null}\n'
    # The last line was cut off when the process was killed.
    out.write_bytes((text + damaged).encode("latin-1") + b'{"index": 9, "bits_p')
    summary = run(nvae, images, out, "--samples=3", "--batch=2")
    assert out.read_text().splitlines()[1:5] == text.splitlines()[1:5]
    rows = [row for row in lines_of(out) if "index" in row]
    assert sorted(row["index"] for row in rows) == list(range(11)) and summary["num_images"] == 11
    for row in rows:
        assert row == pytest.approx(whole[row["index"]], rel=1e-5, abs=1e-6)
    before = out.read_text()
    assert run(nvae, images, out, "--samples=3", "--batch=2") == summary
    assert out.read_text() == before


def test_two_processes_leave_nothing_out_and_repeat_nothing(nvae, images, tmp_path):
    alone = run(nvae, images, tmp_path / "one.jsonl", "--batch=2")
    out = tmp_path / "two.jsonl"
    done = torchrun(
        2, "calculate_likelihood.py", f"--net={nvae}", f"--data={images}", f"--out={out}", "--batch=2", "--device=cpu"
    )
    assert done.returncode == 0, done.stderr
    rows = [row for row in lines_of(out) if "index" in row]
    assert sorted(row["index"] for row in rows) == list(range(11))
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(alone, rel=1e-6, abs=1e-9)


def test_bad_input(nvae, images, tmp_path, snapshot_file):
    out = tmp_path / "x.jsonl"
    options = [f"--data={images}", f"--out={out}"]
    fails_with(run_cli(calculate, f"--net={snapshot_file}", *options), "(1, 8, 10)", "(1, 8, 0)")
    fails_with(run_cli(calculate, f"--net={nvae}", *options, "--samples=0"), "--samples must be at least 1")
    fails_with(run_cli(calculate, f"--net={nvae}", *options, "--max-batch=7", "--batch=8"), "--max-batch=7 is below")
    colour = make_dataset(tmp_path / "colour.zip", random_images(2))
    fails_with(run_cli(calculate, f"--net={nvae}", f"--data={colour}", f"--out={out}"), "(1, 8, 0)", "(3, 8, 0)")
    assert not out.exists()
    for name, place in (("--data", images), ("--net", nvae)):
        before = Path(place).read_bytes()
        result = run_cli(calculate, f"--net={nvae}", f"--data={images}", f"--out={place}")
        fails_with(result, f"--out={place}: is the same as {name}={place}: choose another place")
        assert Path(place).read_bytes() == before
    for text in ("{}", '{"facts": []}', "[1]"):
        out.write_text(text + "\n")
        fails_with(run_cli(calculate, f"--net={nvae}", *options), "holds no likelihoods")
    out.unlink()
    run(nvae, images, out, "--num=1")
    fails_with(run_cli(calculate, f"--net={nvae}", *options, "--samples=2"), "likelihoods of another samples")


# ---------------------------------------------------------------------------------------------------------
# Denoisers


@pytest.fixture(scope="module")
def gaussian_images(tmp_path_factory):
    """Images whose pixels are independent and normally distributed."""
    pixels = 128 + 40 * np.random.default_rng(0).standard_normal([24, 8, 8])
    files = {f"{i:02d}.png": png(image.clip(0, 255).astype(np.uint8)) for i, image in enumerate(pixels)}
    return make_dataset(tmp_path_factory.mktemp("normal") / "data.zip", files)


@pytest.mark.parametrize("family", ["edm2", "score_sde", "uvit"])
def test_flow_likelihood_of_every_family(gaussian_images, tmp_path, family):
    """Every option, with a network of each family; the figures of an image do not depend on its batch."""
    name, presets = {
        "edm2": ("digits", EDM2_PRESETS),
        "score_sde": ("digits-ve", SCORE_PRESETS),
        "uvit": ("digits-uvit", UVIT_PRESETS),
    }[family]
    torch.manual_seed(0)
    net = preset_network(dataclasses.replace(presets[name], classes=0) if family == "edm2" else presets[name])
    path = tmp_path / "net.safetensors"
    save_network(path, net, StandardRGBEncoder(*net.spec.pixel_range), {}, torch.float32)
    data = gaussian_images if family != "uvit" else DIGITS
    options = [
        "--trace=gaussian",
        "--rtol=0.01",
        "--atol=0.01",
        "--repeats=2",
        "--levels=17",
        "--dequantization=uniform",
    ]
    options += ["--schedule=network", "--common-norm=0", "--num=3"]
    summary = run(path, data, tmp_path / "a.jsonl", *options, "--batch=3")
    run(path, data, tmp_path / "b.jsonl", *options, "--batch=1")
    a, b = ({row["index"]: row for row in lines_of(tmp_path / f"{x}.jsonl") if "index" in row} for x in "ab")
    for i in a:
        assert a[i]["bits_per_dim"] == pytest.approx(b[i]["bits_per_dim"], rel=0.02, abs=0.05)
    assert summary["num_images"] == 3 and summary["nfe"] > 10 and math.isfinite(summary["bits_per_dim"])
    facts = lines_of(tmp_path / "a.jsonl")[0]["facts"]
    assert facts["likelihood"] == "probability flow" and facts["levels"] == 17 and "(" in facts["schedule"]
    result = run_cli(calculate, f"--net={path}", f"--data={data}", f"--out={tmp_path / 'c.jsonl'}", "--samples=2")
    fails_with(result, "--samples has no effect on")


class IdealNet(torch.nn.Module):
    """The ideal denoiser of independent normal pixels."""

    precision = "fp32"
    spec = DataSpec(channels=1, resolution=8)

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, sigma, cond=None):
        share = self.std**2 / (self.std**2 + sigma.reshape(-1, 1, 1, 1) ** 2)
        return (self.mean + share * (x - self.mean)).to(x.dtype)


@pytest.mark.parametrize("trace", ["rademacher", "gaussian", "exact"])
@pytest.mark.parametrize("schedule", ["network", "vp", "subvp"])
def test_flow_likelihood_is_the_normal_density(trace, schedule):
    """Bits per dimension are those of the density, whose log is known, at each 8-bit image spread over its levels."""
    std = 40 / 127.5
    config = FlowLikelihoodConfig(trace=trace, schedule=schedule, repeats=3)
    likelihood = FlowLikelihood(IdealNet(0.0, std), config)
    images = (128 + 40 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))).clip(0, 255).byte()
    found = likelihood.figures(images, StackedRandomGenerator("cpu", [5, 6]))
    centres = (images.double() + 0.5) / 128 - 1
    log_p = -((centres / std) ** 2 + (1 / 128) ** 2 / 12 / std**2) / 2 - math.log(std * math.sqrt(2 * math.pi))
    expected = -(log_p + math.log(1 / 128)).mean(dim=(1, 2, 3)) / math.log(2)
    # The trace of a diagonal Jacobian is exact with +-1. With normal vectors, its relative error is sqrt(2 / D), of what
    # the density changes by from the data to the prior.
    spread = (2 / 64 / config.repeats) ** 0.5 * math.log2(likelihood.schedule.prior_std / std)
    tolerance = 3 * spread if trace == "gaussian" else 0.01
    assert (found["bits_per_dim"] - expected).abs().max() < tolerance, (found["bits_per_dim"], expected)
    assert (found["nfe"] > 10).all()


def test_latents_have_no_density(images, tmp_path):
    net = preset_network(SCORE_PRESETS["digits-vp"])
    path = tmp_path / "net.safetensors"
    save_network(path, net, RawLatentEncoder([0.0], [1.0]), {}, torch.float32)
    result = run_cli(calculate, f"--net={path}", f"--data={images}", f"--out={tmp_path / 'x.jsonl'}")
    fails_with(result, "works on latents, and its encoder gives no density of pixels")


# ---------------------------------------------------------------------------------------------------------
# Latents: the noise that the flow carries images to

QUICK = ["--rtol=0.01", "--atol=0.01", "--dequantization=none", "--batch=2", "--device=cpu"]


@pytest.fixture(scope="module")
def flow_net(tmp_path_factory):
    torch.manual_seed(0)
    net = preset_network(SCORE_PRESETS["digits-ve"])
    for parameter in net.parameters():
        if not parameter.any():  # where nothing moves an image yet
            torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("flow") / "net.safetensors"
    save_network(path, net, StandardRGBEncoder(*net.spec.pixel_range), {}, torch.float32)
    return path


def latents_in(folder) -> dict[str, np.ndarray]:
    return {path.name: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}


def test_latents_are_what_the_flow_makes_the_image_of(flow_net, images, tmp_path):
    """Followed back from there by the sampler, which starts at unit noise, the flow ends in the image."""
    folder = tmp_path / "z"
    options = ["--num=3", "--rtol=1e-5", "--atol=1e-5", "--dequantization=none", "--repeats=2"]
    run(flow_net, images, tmp_path / "a.jsonl", f"--latents={folder}", *options)
    found = latents_in(folder)
    assert sorted(found) == ["000000.npy", "000001.npy", "000002.npy"]
    z = torch.from_numpy(np.stack([found[name] for name in sorted(found)]))
    assert z.dtype == torch.float32 and z.shape == (3, 1, 8, 8)
    net = load_network(flow_net).net
    sampler = Sampler(SamplerConfig(solver="rk45"), ode_grid(schedule_of(net), FIRST_TIME))
    with torch.no_grad():
        back = sampler(net, z)
    pixels = torch.from_numpy(np.stack([ImageFolderDataset(images)[i][0] / 255 for i in range(3)])).float()
    assert float((back - pixels).abs().max()) < 0.01
    assert float((z * net.preconditioning.schedule.prior_std - pixels).abs().max()) > 0.1  # the flow moves images


def test_latents_are_resumed_and_shared_over_processes(flow_net, images, tmp_path):
    run(flow_net, images, tmp_path / "whole.jsonl", f"--latents={tmp_path / 'whole'}", *QUICK)
    whole = latents_in(tmp_path / "whole")
    assert len(whole) == 11
    out, folder = tmp_path / "parts.jsonl", tmp_path / "parts"
    run(flow_net, images, out, "--num=3", *QUICK)  # figures only
    before = out.read_text().splitlines()[1:4]
    run(flow_net, images, out, f"--latents={folder}", "--num=5", *QUICK)
    (folder / "000001.npy").unlink()
    command = [f"--net={flow_net}", f"--data={images}", f"--out={out}", f"--latents={folder}", *QUICK]
    done = torchrun(2, "calculate_likelihood.py", *command)
    assert done.returncode == 0, done.stderr
    parts = latents_in(folder)
    assert parts.keys() == whole.keys()
    for name, z in parts.items():
        np.testing.assert_allclose(z, whole[name], rtol=0.02, atol=0.02)
    rows = [line for line in lines_of(out) if "index" in line]
    assert [json.dumps(row) for row in rows[:3]] == before and sorted(row["index"] for row in rows) == list(range(11))


def test_latents_that_cannot_be_saved(flow_net, nvae, images, tmp_path):
    out, folder = tmp_path / "x.jsonl", tmp_path / "z"
    result = run_cli(calculate, f"--net={nvae}", f"--data={images}", f"--out={out}", f"--latents={folder}")
    fails_with(result, "--latents: NVAE networks have no flow that carries images to noise", "reconstruct")
    assert not folder.exists() and not out.exists()
    run(flow_net, images, out, f"--latents={folder}", "--num=1", *QUICK)
    options = [f"--net={flow_net}", f"--data={images}", "--num=1", *QUICK]
    result = run_cli(calculate, *options, f"--out={tmp_path / 'y.jsonl'}", f"--latents={folder}", "--seed=1")
    fails_with(result, f"--latents={folder}: holds latents of another seed")
    (folder / "latents.json").unlink()
    result = run_cli(calculate, *options, f"--out={tmp_path / 'y.jsonl'}", f"--latents={folder}")
    fails_with(result, f"--latents={folder}: holds arrays, and does not say of what")
    assert not (tmp_path / "y.jsonl").exists()
