"""Encoders, and the VAEs that they load."""

import logging
import shutil

import numpy as np
import pytest
import torch
from conftest import DIGITS, fails_with, make_dataset, npy, run_cli
from safetensors.torch import load_file, save_file

from dataset_tool import main as dataset_tool
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset
from training.encoders import RawLatentEncoder, StabilityVAEEncoder, StandardRGBEncoder, encoder_for


def test_pixel_encoder():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    encoder = StandardRGBEncoder()
    z = encoder.encode(x)
    assert (z.min().item(), z.max().item()) == (-1, 1)
    assert torch.equal(encoder.decode(z), x)
    assert encoder.decode(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_encoder_follows_the_data(tmp_path):
    def dataset(name, latents):
        return ImageFolderDataset(make_dataset(tmp_path / name, {f"{i}.npy": npy(x) for i, x in enumerate(latents)}))

    assert isinstance(encoder_for(ImageFolderDataset(DIGITS)), StandardRGBEncoder)
    rng = np.random.default_rng(0)
    vae_latents = dataset("vae", rng.normal(size=[2, 8, 4, 4]).astype(np.float32))
    lines = []
    encoder = encoder_for(vae_latents, log=lines.append)
    assert isinstance(encoder, StabilityVAEEncoder)
    assert encoder.final_channels(8) == 4
    assert len(lines) == 1 and "does not say which VAE made its latents: assuming stabilityai/sd-vae-ft-mse" in lines[0]
    raw = dataset(
        "raw", (rng.normal(size=[200, 3, 4, 4]) * [[[2]], [[3]], [[4]]] + [[[1]], [[0]], [[-1]]]).astype(np.float32)
    )
    encoder = encoder_for(raw)
    assert isinstance(encoder, RawLatentEncoder)
    x = torch.from_numpy(np.stack([raw[i][0] for i in range(200)]))
    z = encoder.encode_latents(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.full([3], 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(encoder.decode(z), x)
    constant = dataset("constant", np.ones([2, 3, 4, 4], np.float32))
    with pytest.raises(UserError, match="not constant"):
        encoder_for(constant)


def test_latents_out_of_bounds(tmp_path):
    """One flipped bit can make a number that no snapshot may hold."""
    latents = np.random.default_rng(0).normal(size=[3, 3, 4, 4]).astype(np.float32)
    latents[1, 2, 0, 0] = 1.5e38
    path = make_dataset(tmp_path / "l.zip", {f"{i}.npy": npy(x) for i, x in enumerate(latents)})
    with pytest.raises(UserError, match="l.zip: cannot read 1.npy: the latents hold NaN or infinity, or numbers"):
        encoder_for(ImageFolderDataset(path))


def test_vae_latents_are_drawn_and_whitened():
    encoder = StabilityVAEEncoder()
    mean, std = torch.tensor(encoder.raw_mean), torch.tensor(encoder.raw_std)
    latents = torch.cat([mean, torch.zeros(4)]).reshape(1, 8, 1, 1).expand(2, 8, 3, 3)
    torch.testing.assert_close(encoder.encode_latents(latents), torch.zeros(2, 4, 3, 3), atol=1e-6, rtol=0)
    spread = torch.cat([mean, std]).reshape(1, 8, 1, 1).expand(2, 8, 3, 3)
    z = encoder.encode_latents(spread, randn_like=torch.ones_like)
    torch.testing.assert_close(z, torch.full([2, 4, 3, 3], 0.5))


def test_vae_pixels(vae):
    from diffusers import AutoencoderKL

    encoder, model = StabilityVAEEncoder(vae_name=str(vae), batch_size=2), AutoencoderKL.from_pretrained(vae).eval()
    pixels = torch.randint(256, [3, 3, 16, 16], dtype=torch.uint8)
    raw = encoder.encode_pixels(pixels)
    assert raw.shape == (3, 8, 2, 2)
    with torch.inference_mode():
        expected = model.encode(pixels.float() / 255).latent_dist  # [0, 1], not [-1, 1]
    torch.testing.assert_close(raw, torch.cat([expected.mean, expected.std], dim=1), rtol=1e-4, atol=1e-5)
    decoded = encoder.decode(encoder.encode_latents(raw, randn_like=torch.zeros_like))
    with torch.inference_mode():
        image = model.decode(expected.mean).sample.clamp(0, 1) * 255
    assert decoded.dtype == torch.uint8
    assert (decoded.float() - image).abs().max() < 1.01


def test_missing_vae_is_one_line(tmp_path):
    pytest.importorskip("diffusers")
    encoder = StabilityVAEEncoder(vae_name=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="could not be loaded") as err:
        encoder.decode(torch.zeros(1, 4, 2, 2))
    assert "\n" not in str(err.value)


def test_missing_vaes(vae, pixels, tmp_path, monkeypatch):
    (tmp_path / "lone.safetensors").write_bytes((vae / "diffusion_pytorch_model.safetensors").read_bytes())
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    missing = "could not be loaded: no such file or folder"
    cases = [
        # Tests have no network: HF_HUB_OFFLINE=1, of which the project knows nothing, stands for that.
        ("owner/repo", [], 1, "hf://owner/repo/config.json: not fetched from the hub (", "--offline"),
        (
            "owner/repo",
            ["--offline"],
            2,
            "(OPENEDM2_OFFLINE=1)",
            "/repo/config.json hf://owner/repo/diffusion_pytorch_",
        ),
        (str(tmp_path / "nowhere/vae"), ["--offline"], 2, missing),
        ("./missing.safetensors", ["--offline"], 2, missing),
        ("some/missing.safetensors", [], 2, missing),
        ("~/vae", [], 2, missing),
        ("missing", [], 2, missing),
        ("empty", [], 2, "no file named config.json"),
        ("lone.safetensors", ["--offline"], 2, "no config.json beside it", "put its own beside it"),
    ]
    for name, options, exit_code, *fragments in cases:
        args = ["encode", f"--source={pixels}", "--dest=x.zip", f"--model-url={name}", *options]
        fails_with(run_cli(dataset_tool, *args), f"the VAE {name} could not", *fragments, exit_code=exit_code)
        monkeypatch.setenv("OPENEDM2_OFFLINE", "0")  # --offline sets it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("encoder.conv_in.bias"), "it lacks 1 weights, such as encoder.conv_in.bias"),
        (lambda weights: weights.update({"encoder.conv_in.bias": torch.zeros(9)}), "size mismatch for encoder.conv_in"),
    ],
)
def test_vae_with_weights_of_another_model(vae, pixels, tmp_path, change, message):
    other = tmp_path / "vae"
    shutil.copytree(vae, other)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    change(weights)
    save_file(weights, other / "diffusion_pytorch_model.safetensors")
    args = ["encode", f"--source={pixels}", f"--dest={tmp_path / 'x.zip'}", f"--model-url={other}"]
    fails_with(run_cli(dataset_tool, *args), f"the VAE {other} could not be loaded", message)


def test_vae_of_the_hub(vae, tmp_path, monkeypatch, caplog):
    """It is found in the hub's cache, and loading it says nothing."""
    repo = tmp_path / "models--owner--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(vae, repo / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = vae / "diffusion_pytorch_model.safetensors"
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        names = ["owner/repo", str(vae), str(file)]
        models = [StabilityVAEEncoder(vae_name=name).vae(torch.device("cpu")) for name in names]
    finally:
        logger.removeHandler(caplog.handler)
    expected = load_file(file)
    for model in models:
        torch.testing.assert_close(dict(model.state_dict()), expected)
    assert caplog.messages == []
