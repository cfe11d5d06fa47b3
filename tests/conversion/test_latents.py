"""Datasets through a VAE and back."""

import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, fails_with, make_dataset, npy, png, random_images, run_cli, torchrun
from sources import check, convert, labels_of

from dataset_tool import main as dataset_tool
from train_edm2 import main as train
from training.dataset.images import ImageFolderDataset
from training.encoders import StabilityVAEEncoder


def run_tool(*args) -> None:
    result = run_cli(dataset_tool, *args)
    assert result.exit_code == 0, result.output


def test_encode(vae, pixels, tmp_path):
    from diffusers import AutoencoderKL

    run_tool("encode", f"--source={pixels}", f"--dest={tmp_path / 'l.zip'}", f"--model-url={vae}", "--batch=3")
    latents, images = ImageFolderDataset(tmp_path / "l.zip"), ImageFolderDataset(pixels)
    assert latents.name(3) == "00000/img-mean-std-00000003.npy"
    assert (latents.image_shape, latents.dtype) == ((8, 2, 2), np.float32)
    assert labels_of(latents) == [i % 3 for i in range(10)]
    model = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        x = torch.from_numpy(images[3][0])[None].float() / 255  # [0, 1], as the published latents were made
        distribution = model.encode(x).latent_dist
    expected = torch.cat([distribution.mean, distribution.std], dim=1)[0]
    torch.testing.assert_close(torch.from_numpy(latents[3][0]), expected, rtol=1e-4, atol=1e-5)
    file = vae / "diffusion_pytorch_model.safetensors"
    run_tool("encode", f"--source={pixels}", f"--dest={tmp_path / 'f.zip'}", f"--model-url={file}", "--batch=3")
    np.testing.assert_array_equal(ImageFolderDataset(tmp_path / "f.zip")[3][0], latents[3][0])
    # Training draws mean + std * noise, whitened.
    encoder = StabilityVAEEncoder()
    final = encoder.encode_latents(expected[None], lambda mean: torch.full_like(mean, 2.0))
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (encoder.raw_mean, encoder.raw_std))
    torch.testing.assert_close(final[0], (expected[:4] + 2 * expected[4:] - mean) / std * 0.5)


def test_decode(vae, pixels, tmp_path):
    from diffusers import AutoencoderKL

    run_tool("encode", f"--source={pixels}", f"--dest={tmp_path / 'l.zip'}", f"--model-url={vae}")
    run_tool(
        "decode", f"--source={tmp_path / 'l.zip'}", f"--dest={tmp_path / 'd'}", f"--model-url={vae}", "--max-images=4"
    )
    decoded, latents = ImageFolderDataset(tmp_path / "d"), ImageFolderDataset(tmp_path / "l.zip")
    assert len(decoded) == 4 and labels_of(decoded) == [0, 1, 2, 0]
    model = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        x = model.decode(torch.from_numpy(latents[2][0][None, :4])).sample.clamp(0, 1) * 255
    assert np.abs(decoded[2][0].astype(int) - x[0].numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("precision", ["bf16"])
def test_precision(precision, vae, pixels, tmp_path):
    for name in ("fp32", precision):
        run_tool("encode", f"--source={pixels}", f"--dest={tmp_path / name}", f"--model-url={vae}", f"--precision={name}", "--max-images=2", "--device=cpu", "--offline")  # fmt: skip
    exact, rough = (ImageFolderDataset(tmp_path / name)[0][0] for name in ("fp32", precision))
    error = np.linalg.norm(exact - rough) / np.linalg.norm(exact)
    assert 0 < error < 0.05


def test_class_names_survive(vae, tmp_path):
    """From folders to images, to latents and back."""
    files = {f"{c}/0.png": png(np.zeros([16, 16, 3], np.uint8)) for c in ("cat", "dog")}
    convert(tmp_path, make_dataset(tmp_path / "src", files))
    for command, source, dest in (("encode", "out.zip", "latents.zip"), ("decode", "latents.zip", "decoded")):
        run_tool(command, f"--source={tmp_path / source}", f"--dest={tmp_path / dest}", f"--model-url={vae}")
        dataset = ImageFolderDataset(tmp_path / dest)
        assert (labels_of(dataset), dataset.class_names) == ([0, 1], ["cat", "dog"])
    dataset = convert(tmp_path, tmp_path / "decoded", dest="again.zip")
    assert dataset.class_names == ["cat", "dog"]


# dataset_tool.py with a VAE that is quick to load: averages of 8x8 pixels.
QUICK_VAE = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import dataset_tool
from training.encoders import StabilityVAEEncoder
StabilityVAEEncoder.prepare = lambda self, device: None
StabilityVAEEncoder.identified = lambda self: self
StabilityVAEEncoder.downsampling = lambda self: 8
StabilityVAEEncoder.encode_pixels = lambda self, x, _draw: torch.nn.functional.avg_pool2d(x.float(), 8).repeat(1, 3, 1, 1)[:, :8]
"""


def test_two_processes_share_the_work(pixels, tmp_path):
    (tmp_path / "script.py").write_text(f"{QUICK_VAE}\ndataset_tool.main()\n")
    done = torchrun(
        2, tmp_path / "script.py", "encode", f"--source={pixels}", f"--dest={tmp_path / 'l.zip'}", "--batch=2"
    )
    assert done.returncode == 0, done.stderr
    latents, images = ImageFolderDataset(tmp_path / "l.zip"), ImageFolderDataset(pixels)
    assert labels_of(latents) == labels_of(images)
    for (latent, _), (image, _) in zip(latents, images, strict=True):
        average = image.reshape(3, 2, 8, 2, 8).mean(axis=(2, 4), dtype=np.float32)
        np.testing.assert_array_equal(latent, np.tile(average, [3, 1, 1])[:8])


def test_resumed_encoding(vae, pixels, tmp_path, monkeypatch):
    args = ["encode", f"--source={pixels}", f"--dest={tmp_path / 'l.zip'}", f"--model-url={vae}", "--batch=2"]
    calls = []
    encode_pixels = StabilityVAEEncoder.encode_pixels

    def interrupted(self, x, randn_like):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_pixels(self, x, randn_like)

    monkeypatch.setattr(StabilityVAEEncoder, "encode_pixels", interrupted)
    result = run_cli(dataset_tool, *args)
    assert result.exit_code == 130 and "Interrupted: repeat the command with --resume to continue" in result.stderr
    run_tool(*args, "--resume")
    assert calls == [2] * 3 + [2] * 3
    assert len(ImageFolderDataset(tmp_path / "l.zip")) == 10


def test_compressed_datasets_are_noted(vae, tmp_path):
    packed = make_dataset(tmp_path / "packed.zip", random_images(2, size=16), compression=zipfile.ZIP_DEFLATED)
    plain = make_dataset(tmp_path / "plain.zip", random_images(2, size=16))
    options = ["--preset=digits", "--cond=0", "--dry-run", f"--outdir={tmp_path / 'run'}"]
    for source, notes in ((packed, 1), (plain, 0)):
        for args in (
            [dataset_tool, "encode", f"--source={source}", f"--dest={tmp_path / source.stem}", f"--model-url={vae}"],
            [train, f"--data={source}", *options],
        ):
            result = run_cli(*args)
            assert result.exit_code == 0, result.output
            assert result.output.count(f"={source} is compressed: slow to read; store it without compression") == notes
            assert f"{source}: 2 images (2 .png), pixels of 16x16 with 3 channels" in result.output
        assert ("compressed" in check(source)) == bool(notes)


@pytest.mark.parametrize(("command", "method"), [("encode", "encode_pixels"), ("decode", "raw_to_floats")])
def test_numbers_that_overflow(command, method, vae, pixels, tmp_path, monkeypatch):
    source = pixels
    if command == "decode":
        source = tmp_path / "latents.zip"
        run_tool("encode", f"--source={pixels}", f"--dest={source}", f"--model-url={vae}")
    shape, calls = ([8, 2, 2] if command == "encode" else [3, 16, 16]), []

    def overflowing(self, x, *_args):
        result = torch.zeros([len(x), *shape])
        calls.append(len(x))
        if len(calls) == 2:
            result[1, 2, 0, 0] = torch.inf if command == "encode" else torch.nan
        return result

    monkeypatch.setattr(StabilityVAEEncoder, method, overflowing)
    name = ImageFolderDataset(source).name(4)  # the second of the second three
    for precision, advice in [("fp16", "give --precision=fp32 or bf16"), ("fp32", "is --encoder the right VAE")]:
        calls.clear()
        args = [f"--source={source}", f"--model-url={vae}", "--batch=3", f"--precision={precision}"]
        result = run_cli(dataset_tool, command, *args, f"--dest={tmp_path / precision}.zip")
        fails_with(result, f"{source}: {name}: the VAE turns it into NaN or infinity", advice)
        assert not (tmp_path / f"{precision}.zip").exists()


def test_full_disk_under_torchrun(tmp_path):
    source = make_dataset(tmp_path / "pixels", random_images(10, size=64))  # latents of 2 KiB, past a file's buffer
    args = ["encode", f"--source={source}", f"--dest={tmp_path / 'l.zip'}", "--batch=1"]
    (tmp_path / "script.py").write_text(
        f"{QUICK_VAE}\nresource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\ndataset_tool.main({args!r})\n"
    )
    done = torchrun(2, tmp_path / "script.py")
    assert done.returncode == 1
    assert f"Error: File too large: {tmp_path / 'l.zip.partial'}\n" in done.stderr
    # torchrun has a traceback of its own.
    assert "latents.py" not in done.stderr and "Connection closed" not in done.stderr
    assert not (tmp_path / "l.zip.partial.lock").exists()


def test_bad_latents(vae, pixels, tmp_path):
    args = [f"--dest={tmp_path / 'x.zip'}", f"--model-url={vae}"]
    fails_with(
        run_cli(dataset_tool, "decode", f"--source={pixels}", *args), "holds 3 channels of uint8, not VAE latents"
    )
    latents = make_dataset(tmp_path / "l.zip", {"a.npy": npy(np.ones([8, 2, 2], np.float32))})
    fails_with(run_cli(dataset_tool, "encode", f"--source={latents}", *args), "8 channels of float32, not images")
    odd = make_dataset(tmp_path / "odd.zip", random_images(1, size=9))
    fails_with(run_cli(dataset_tool, "encode", f"--source={odd}", *args), "divisible by 8, not 9")
    bad = make_dataset(tmp_path / "nan.zip", {"a.npy": npy(np.full([8, 2, 2], np.nan, np.float32))})
    fails_with(run_cli(dataset_tool, "decode", f"--source={bad}", *args), "the latents hold NaN")
