"""A diffusion model as the prior of an NVAE: latents of all groups, training on them, images of what it makes."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import DIGITS, fails_with, images_in, random_images, run_cli
from conftest import make_dataset as make
from sources import check, labels_of

from dataset_tool import main as dataset_tool
from dnnlib.files import file_sha256
from generate_images import main as generate
from train_edm2 import main as train
from training.dataset.images import ImageFolderDataset
from training.encoders import FINAL_STD, NVAEEncoder, encoder_for
from training.samplers import StackedRandomGenerator
from training.snapshot import load_network, save_network
from training.snapshot.nvae_latents import NVAELatents

RUN = ["--preset=digits-nvae-prior", "--channels=8", "--batch=128", "--duration=128", "--ema-std=0.1", "--device=cpu"]


def ok(command, *args) -> str:
    result = run_cli(command, *args)
    assert result.exit_code == 0, result.output
    return result.output


def encode(nvae, dest, *options):
    ok(dataset_tool, "encode", f"--source={DIGITS}", f"--dest={dest}", f"--encoder={nvae}", "--device=cpu", *options)
    return dest


@pytest.fixture(scope="module")
def latents(nvae, tmp_path_factory):
    return encode(nvae, tmp_path_factory.mktemp("latents") / "l.zip", "--draws=2", "--max-images=30", "--batch=16")


@pytest.fixture(scope="module")
def prior(latents, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("prior")
    output = ok(train, f"--outdir={outdir}", f"--data={latents}", *RUN, "--preview-images=2", "--preview-steps=2")
    assert "Encoder: latents of the NVAE" in output and "shows latents" not in output  # the previews are pixels
    return outdir / "network-snapshot-0000000-0.100.safetensors"


def test_latents_are_those_that_the_decoder_draws(nvae, latents, tmp_path):
    dataset, images = ImageFolderDataset(latents), ImageFolderDataset(DIGITS)
    assert (len(dataset), dataset.image_shape, dataset.dtype) == (60, (24, 4, 4), np.float32)
    assert labels_of(dataset) == [label for label in labels_of(images)[:30] for _ in range(2)]
    net = load_network(nvae).net
    noise = net.split_noise(StackedRandomGenerator("cpu", [7]).randn([1, net.noise_size]))
    x = (torch.from_numpy(images[3][0])[None].int() * 17 // 256).float() / 16
    with torch.no_grad():
        top, *lower = net.prior_draws(x, noise)
    found = torch.from_numpy(dataset[7][0])[None]
    torch.testing.assert_close(found[:, :8], top.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(found[:, 8:], torch.cat(lower, dim=1))
    assert not np.allclose(dataset[6][0], dataset[7][0], atol=0.1)  # the other draw for the same image
    # An item depends on its index alone.
    again = ImageFolderDataset(encode(nvae, tmp_path / "l.zip", "--draws=2", "--max-images=5", "--batch=3"))
    np.testing.assert_allclose(again[7][0], dataset[7][0], rtol=1e-4, atol=1e-5)


def test_images_that_are_left_out_are_counted_not_draws(nvae, tmp_path):
    args = [f"--source={DIGITS}", f"--dest={tmp_path / 'l.zip'}", f"--encoder={nvae}", "--device=cpu"]
    output = ok(dataset_tool, "encode", *args, "--draws=2", "--max-images=5", "--batch=16")
    assert "l.zip: 10 items" in output and "Note: only the first 5 of 1797 images, which have 5 of 10" in output


def test_record(nvae, latents):
    with zipfile.ZipFile(latents) as archive:
        record = json.loads(archive.read("dataset.json"))["encoder"]
    kwargs = {"vae_name": str(nvae), "vae_sha256": file_sha256(nvae)}
    assert record == {"name": "NVAEEncoder", "kwargs": kwargs}
    assert check(latents)["vae"] == str(nvae)


def test_groups_are_packed_and_unpacked(nvae):
    latents = NVAELatents(load_network(nvae).net)
    assert (latents.channels, latents.resolution) == (24, 4)
    draws = [torch.randn(3, *shape) for shape in latents.net.latent_shapes]
    for there, back in zip(draws, latents.unpack(latents.pack(draws)), strict=True):
        torch.testing.assert_close(back, there)


def test_decoding(nvae, latents, tmp_path):
    """Final latents have the standard deviation of all latents, and become the mean images of these draws."""
    dataset, net = ImageFolderDataset(latents), load_network(nvae).net
    encoder = encoder_for(dataset)
    assert isinstance(encoder, NVAEEncoder)
    raw = torch.from_numpy(np.stack([dataset[i][0] for i in range(4)]))
    final = encoder.encode_latents(raw)
    torch.testing.assert_close(final, raw * FINAL_STD)
    top = torch.nn.functional.avg_pool2d(raw[:, :8], 2)
    with torch.no_grad():
        mean = net.decoder.mean(net.sample(4, noise=[top, raw[:, 8:16], raw[:, 16:]])) * 255
    assert (encoder.decode(final).float() - mean).abs().max() < 0.51
    ok(dataset_tool, "decode", f"--source={latents}", f"--dest={tmp_path / 'd'}", "--max-images=4", "--device=cpu")
    decoded = ImageFolderDataset(tmp_path / "d")
    assert labels_of(decoded) == labels_of(dataset)[:4]
    np.testing.assert_array_equal(np.stack([decoded[i][0] for i in range(4)]), encoder.decode(final).numpy())


def test_images_of_a_prior(nvae, prior, tmp_path):
    snapshot = load_network(prior)
    assert snapshot.net.spec.shape == (24, 4, 4) and snapshot.encoder.vae_name == str(nvae)
    args = [f"--net={prior}", "--seeds=0-2", "--steps=2", "--class=3", "--device=cpu"]
    ok(generate, *args, f"--outdir={tmp_path / 'out'}", f"--grid={tmp_path / 'grid.png'}")
    images = images_in(tmp_path / "out")
    assert images["000000.png"].shape == (8, 8) and not np.array_equal(images["000000.png"], images["000001.png"])
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["encoder"]["name"] == "NVAEEncoder"
    fails_with(run_cli(generate, *args, f"--outdir={tmp_path}", "--temperature=0.7"), "no meaning for EDM2")


def test_an_nvae_that_has_moved(nvae, prior, tmp_path):
    snapshot = load_network(prior)
    kwargs = {**snapshot.encoder.init_kwargs, "vae_name": str(tmp_path / "gone.safetensors")}
    net = tmp_path / "net.safetensors"
    save_network(net, snapshot.net, NVAEEncoder(**kwargs), {})
    args = [f"--net={net}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2"]
    fails_with(run_cli(generate, *args), "gone.safetensors could not be loaded: no such file: give --encoder")
    copy = shutil.copy(nvae, tmp_path / "copy.safetensors")
    ok(generate, *args, f"--encoder={copy}")
    # In its place, another one.
    other = load_network(nvae)
    other.net.stem.bias += 1
    save_network(tmp_path / "gone.safetensors", other.net, other.encoder, {})
    fails_with(run_cli(generate, *args), "is another than", "SHA-256", "--encoder")
    # A URL is fetched for a file only where the user trusts it.
    save_network(net, snapshot.net, NVAEEncoder(**{**kwargs, "vae_name": copy.as_uri()}), {})
    fails_with(run_cli(generate, *args), "is not fetched unless you add --trust-encoder=1")
    ok(generate, *args, "--trust-encoder=1")


def test_options_that_do_not_fit(nvae, vae, prior, pixels, tmp_path):
    args = ["encode", f"--source={DIGITS}", f"--dest={tmp_path / 'x.zip'}"]
    for option in ("--scale=0.5", "--pixel-range=0,1"):
        message = f"{option.split('=')[0]} has no meaning for latents of an NVAE"
        fails_with(run_cli(dataset_tool, *args, f"--encoder={nvae}", option), message)
    fails_with(run_cli(dataset_tool, *args, f"--encoder={prior}"), f"{prior}: holds a Precond, which has no latents")
    args = ["encode", f"--source={pixels}", f"--dest={tmp_path / 'x.zip'}"]
    fails_with(run_cli(dataset_tool, *args, f"--encoder={nvae}"), "knows images of 8x8x1, not 16x16x3")
    fails_with(run_cli(dataset_tool, *args, f"--encoder={vae}", "--draws=2"), "--draws=2", "only latents of an NVAE")
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes(nvae.read_bytes()[:-100])
    fails_with(run_cli(dataset_tool, *args, f"--encoder={damaged}"), "damaged or truncated snapshot")
    # Latents of other networks.
    small = make(tmp_path / "small.zip", random_images(1, size=4, channels=None))
    fails_with(
        run_cli(train, f"--outdir={tmp_path}", f"--data={small}", *RUN, "--cond=0", f"--encoder={nvae}"),
        "is for latents",
    )
