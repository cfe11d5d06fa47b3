"""The published autoencoder as diffusers' AutoencoderKL; its names and numbers are checked against golden values."""

import pytest
import torch
from conftest import make_dataset, random_images, run_cli

from dataset_tool import main as dataset_tool
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset
from training.encoders import FINAL_STD, StabilityVAEEncoder, encoder_of_autoencoder
from training.encoders.published_autoencoder import convert_autoencoder, diffusers_config, diffusers_name
from training.snapshot.published_uvit import write

CHANNELS = (32, 64)  # of a small autoencoder


def published_state() -> dict[str, torch.Tensor]:
    """Weights under published names, of an autoencoder with two levels of one block."""
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, cin: int, cout: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(cout, cin, size, size) / (cin * size**2) ** 0.5
        state[f"{name}.bias"] = torch.randn(cout) * 0.1

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(channels), torch.zeros(channels)

    def block(name: str, cin: int, cout: int) -> None:
        norm(f"{name}.norm1", cin)
        conv(f"{name}.conv1", cin, cout, 3)
        norm(f"{name}.norm2", cout)
        conv(f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            conv(f"{name}.nin_shortcut", cin, cout, 1)

    low, high = CHANNELS
    for part in ("encoder", "decoder"):
        conv(f"{part}.conv_in", 3 if part == "encoder" else 4, low if part == "encoder" else high, 3)
        for name in ("block_1", "block_2"):
            block(f"{part}.mid.{name}", high, high)
        norm(f"{part}.mid.attn_1.norm", high)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{part}.mid.attn_1.{name}", high, high, 1)
        norm(f"{part}.norm_out", high if part == "encoder" else low)
        conv(f"{part}.conv_out", high if part == "encoder" else low, 8 if part == "encoder" else 3, 3)
    block("encoder.down.0.block.0", low, low)
    conv("encoder.down.0.downsample.conv", low, low, 3)
    block("encoder.down.1.block.0", low, high)
    block("decoder.up.1.block.0", high, high)
    block("decoder.up.1.block.1", high, high)
    conv("decoder.up.1.upsample.conv", high, high, 3)
    block("decoder.up.0.block.0", high, low)
    block("decoder.up.0.block.1", low, low)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    return state


@pytest.fixture
def published_file(tmp_path):
    torch.manual_seed(0)
    write(tmp_path / "autoencoder_kl.pth", published_state())
    return tmp_path / "autoencoder_kl.pth"


def test_diffusers_loads_the_result(published_file, tmp_path):
    """By the way that encoding and decoding take, which refuses missing and unknown weights."""
    convert_autoencoder(published_file, tmp_path / "vae", scale_factor=0.2301)
    encoder = StabilityVAEEncoder(str(tmp_path / "vae"), raw_mean=[0.0] * 4, raw_std=[FINAL_STD / 0.2301] * 4)
    vae = encoder.vae(torch.device("cpu"))
    assert vae.config.scaling_factor == 0.2301
    assert vae.config.block_out_channels == list(CHANNELS) and vae.config.layers_per_block == 1
    images = torch.randint(256, [2, 3, 16, 8], dtype=torch.uint8)
    latents = encoder.encode(images, torch.zeros_like)
    assert latents.shape == (2, 4, 8, 4)
    assert encoder.decode(latents).shape == images.shape


def test_names_between_dots_only():
    assert diffusers_name("quant_conv.weight", 4) == "quant_conv.weight"
    assert (
        diffusers_name("decoder.up.3.block.1.nin_shortcut.bias", 4)
        == "decoder.up_blocks.0.resnets.1.conv_shortcut.bias"
    )


def test_other_files(tmp_path, published_file):
    write(tmp_path / "other.pth", {"weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"other\.pth: no weights of a KL autoencoder: 'encoder\.conv_in\.weight'"):
        convert_autoencoder(tmp_path / "other.pth", tmp_path / "vae")
    assert not (tmp_path / "vae").exists()
    state = published_state()
    assert diffusers_config(state, 1.0)["latent_channels"] == 4


def test_published_files_are_vaes_themselves(tmp_path, published_file):
    """As --model-url and --encoder, without a conversion."""
    convert_autoencoder(published_file, tmp_path / "vae")
    images = torch.randint(256, [2, 3, 16, 8], dtype=torch.uint8)
    encoders = [encoder_of_autoencoder(str(place), pixel_range=(-1, 1)) for place in (published_file, tmp_path / "vae")]
    published, converted = (encoder.scaled_as_configured().encode(images, torch.zeros_like) for encoder in encoders)
    assert encoders[0].scaled_as_configured().scale == 0.18215
    assert torch.equal(published, converted)
    write(tmp_path / "other.pth", {"weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"other\.pth: no weights of a KL autoencoder"):
        encoder_of_autoencoder(str(tmp_path / "other.pth")).vae(torch.device("cpu"))
    state = published_state()
    del state["quant_conv.bias"]
    write(tmp_path / "short.pth", state)
    with pytest.raises(UserError, match=r"short\.pth: .*quant_conv\.bias"):
        encoder_of_autoencoder(str(tmp_path / "short.pth")).vae(torch.device("cpu"))


def test_encode_with_a_published_file(tmp_path, published_file):
    data = make_dataset(tmp_path / "images", random_images(2, size=16))
    args = [f"--source={data}", f"--dest={tmp_path / 'latents.zip'}", f"--model-url={published_file}", "--device=cpu"]
    result = run_cli(dataset_tool, "encode", *args)
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(tmp_path / "latents.zip")
    assert dataset.image_shape == (8, 8, 8)
    assert dataset.encoder_record["kwargs"]["scale"] == 0.18215
    assert list(dataset.encoder_record["kwargs"]["pixel_range"]) == [-1, 1]
