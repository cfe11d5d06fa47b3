"""Latents know which VAE made them: from encode through training and snapshots to decoded images."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, fails_with, images_in, make_dataset, npy, random_images, run_cli, tiny_network
from sources import check

from calculate_metrics import main as metrics_tool
from dataset_tool import main as dataset_tool
from dnnlib.files import file_sha256
from generate_images import main as generate
from snapshot_tool import main as snapshot_tool
from train_edm2 import main as train
from training.dataset.images import ImageFolderDataset
from training.encoders import (
    FINAL_STD,
    AutoencoderDCEncoder,
    StabilityVAEEncoder,
    StandardRGBEncoder,
    encoder_for,
    same_latents,
)
from training.snapshot import load_network, save_network

WEIGHTS = "diffusion_pytorch_model.safetensors"
RUN = [*TINY, "--cond=0", "--batch=16", "--duration=16", "--ema-std=0.1", "--preview-images=2", "--preview-steps=2"]


def ok(command, *args) -> str:
    result = run_cli(command, *args)
    assert result.exit_code == 0, result.output
    return result.output


def record_of(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))["encoder"]


def model_of(path: Path, name: str = "AutoencoderKL"):
    import diffusers

    return getattr(diffusers, name).from_pretrained(path).eval().requires_grad_(False)


def train_on(data: Path, outdir: Path, *options) -> tuple[Path, str]:
    """The snapshot of a short run, and what was printed."""
    output = ok(train, f"--outdir={outdir}", f"--data={data}", *RUN, *options)
    return outdir / "network-snapshot-0000000-0.100.safetensors", output


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("photos") / "photos.zip", random_images(6, size=64))


@pytest.fixture(scope="module")
def latents(vae, photos, tmp_path_factory) -> Path:
    """Latents of a VAE that is not the published one."""
    path = tmp_path_factory.mktemp("latents") / "l.zip"
    assert f"Encoder: AutoencoderKL {vae}, pixels 0 to 1" in ok(
        dataset_tool, "encode", f"--source={photos}", f"--dest={path}", f"--model-url={vae}"
    )
    return path


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory) -> Path:
    path, output = train_on(latents, tmp_path_factory.mktemp("trained"))
    assert "Encoder: AutoencoderKL " in output and "shows latents" not in output  # the previews are pixels
    return path


def test_encode_records_the_vae_and_its_statistics(vae, latents):
    record = record_of(latents)
    assert record["name"] == "StabilityVAEEncoder"
    kwargs = record["kwargs"]
    assert kwargs["vae_name"] == str(vae) and kwargs["vae_sha256"] == file_sha256(vae / WEIGHTS)
    assert kwargs["pixel_range"] == [0, 1]
    raw = np.stack([image for image, _ in ImageFolderDataset(latents)]).astype(np.float64)
    mean, std = raw[:, :4], raw[:, 4:]
    variance = (np.square(mean) + np.square(std)).mean((0, 2, 3)) - np.square(mean.mean((0, 2, 3)))
    np.testing.assert_allclose(kwargs["raw_mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(kwargs["raw_std"], np.sqrt(variance), rtol=1e-12)
    # What training sees has the mean and standard deviation that networks assume.
    encoder = encoder_for(ImageFolderDataset(latents))
    torch.manual_seed(0)
    final = torch.cat([encoder.encode_latents(torch.from_numpy(raw).float()) for _ in range(20)])
    torch.testing.assert_close(final.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(final.std((0, 2, 3)), torch.full([4], FINAL_STD), atol=0.02, rtol=0)
    assert check(latents)["vae"] == str(vae)


def test_interrupted_encoding_has_the_same_statistics(vae, photos, latents, tmp_path, monkeypatch):
    for name in ("l.zip", "folder"):
        args = ["encode", f"--source={photos}", f"--dest={tmp_path / name}", f"--encoder={vae}", "--batch=2"]
        encode_pixels, calls = StabilityVAEEncoder.encode_pixels, []

        def interrupted(self, x, _randn_like, encode_pixels=encode_pixels, calls=calls):
            calls.append(len(x))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encode_pixels(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(StabilityVAEEncoder, "encode_pixels", interrupted)
            assert run_cli(dataset_tool, *args).exit_code == 130
        ok(dataset_tool, *args, "--resume")
    ok(dataset_tool, *args[:2], f"--dest={tmp_path / 'whole.zip'}", *args[3:])
    whole = record_of(tmp_path / "whole.zip")
    assert record_of(tmp_path / "l.zip") == whole
    assert json.loads((tmp_path / "folder" / "dataset.json").read_text())["encoder"] == whole
    np.testing.assert_allclose(whole["kwargs"]["raw_std"], record_of(latents)["kwargs"]["raw_std"], rtol=1e-4)


def test_training_and_sampling_take_the_vae_over(vae, latents, trained, tmp_path):
    """Case 09."""
    snapshot = load_network(trained)
    assert snapshot.metadata["encoder"] == record_of(latents)
    assert json.loads(ok(snapshot_tool, "inspect", trained, "--json"))["encoder"] == record_of(latents)
    ok(generate, f"--net={trained}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2")
    final = torch.randn(1, 4, 8, 8)
    kwargs = record_of(latents)["kwargs"]
    mean, std = (torch.tensor(kwargs[key]).reshape(-1, 1, 1) for key in ("raw_mean", "raw_std"))
    with torch.inference_mode():
        pixels = model_of(vae).decode(final / FINAL_STD * std + mean).sample.clamp(0, 1) * 255
    assert (snapshot.encoder.decode(final).float() - pixels).abs().max() < 1.01
    assert images_in(tmp_path / "out")["000000.png"].shape == (64, 64, 3)
    # Decoding asks for no VAE either.
    ok(dataset_tool, "decode", f"--source={latents}", f"--dest={tmp_path / 'decoded'}", "--max-images=1")


def test_the_hub_gets_no_path_of_this_machine(vae, trained, tmp_path):
    output = ok(snapshot_tool, "export", trained, tmp_path / "hub", "--license=mit")
    assert f"Note: images are decoded with the VAE {vae}, which others need, too" in output
    assert f"8 x 8 x 4 latents of {vae.name} |" in (tmp_path / "hub" / "README.md").read_text()


def test_a_folder_and_a_revision_of_the_hub(vae, photos, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(vae, tmp_path / "models--owner--repo" / "snapshots" / commit / "vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = f"owner/repo@{commit}/vae"
    args = ["encode", f"--source={photos}", f"--dest={tmp_path / 'l.zip'}", f"--encoder={name}", "--max-images=1"]
    ok(dataset_tool, *args)
    kwargs = record_of(tmp_path / "l.zip")["kwargs"]
    assert (kwargs["vae_name"], kwargs["vae_sha256"]) == (name, file_sha256(vae / WEIGHTS))


@pytest.mark.parametrize("kwargs", [{}, {"raw_mean": [], "raw_std": []}, {"raw_mean": [0.0], "raw_std": [1.0]}])
def test_snapshots_without_statistics_are_refused(kwargs, tmp_path):
    net = tiny_network(img_channels=4, label_dim=0)
    save_network(tmp_path / "x.safetensors", net, AutoencoderDCEncoder("owner/repo", **kwargs), {})
    args = [f"--net={tmp_path / 'x.safetensors'}", f"--outdir={tmp_path / 'out'}"]
    fails_with(run_cli(generate, *args), "the encoder has statistics of another number of channels than 4")


def test_a_run_continues_only_with_the_same_encoder(latents, tmp_path):
    def rewritten(name: str, **changes) -> Path:
        record = record_of(latents)
        record["kwargs"] |= changes
        with zipfile.ZipFile(latents) as old, zipfile.ZipFile(tmp_path / name, "w") as new:
            for file in old.namelist():
                contents = json.dumps({"labels": None, "encoder": record}) if file == "dataset.json" else old.read(file)
                new.writestr(file, contents)
        return tmp_path / name

    args = [f"--outdir={tmp_path / 'run'}", *RUN, "--preview=0"]
    ok(train, *args, f"--data={latents}")
    assert "Nothing to do" in ok(train, *args, f"--data={rewritten('moved.zip', vae_name='elsewhere/vae')}")
    other = rewritten("other.zip", raw_mean=[1.0, 2, 3, 4])
    fails_with(run_cli(train, *args, f"--data={other}"), "was trained on other data", "their content differs")


def test_class_labels_or_not_the_record_is_read(latents):
    assert isinstance(encoder_for(ImageFolderDataset(latents, use_labels=False)), StabilityVAEEncoder)
    assert ImageFolderDataset(latents, use_labels=False).encoder_record == record_of(latents)


def test_sixteen_channels(vae16, photos, tmp_path):
    data, model = tmp_path / "l.zip", model_of(vae16)
    args = ["encode", f"--source={photos}", f"--dest={data}", f"--encoder={vae16}", "--max-images=4"]
    ok(dataset_tool, *args, "--scale=config", "--pixel-range=-1,1")
    dataset = ImageFolderDataset(data)
    assert dataset.image_shape == (32, 32, 32)
    kwargs = record_of(data)["kwargs"]
    assert (kwargs["scale"], kwargs["shift"], kwargs["pixel_range"]) == (1.5, 0.25, [-1, 1])
    x = torch.from_numpy(ImageFolderDataset(photos)[0][0])[None]
    with torch.inference_mode():
        distribution = model.encode(x / 127.5 - 1).latent_dist
    encoder = encoder_for(dataset)
    final = encoder.encode_latents(torch.from_numpy(dataset[0][0])[None], torch.ones_like)
    torch.testing.assert_close(final, (distribution.mean + distribution.std - 0.25) * 1.5, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        pixels = (model.decode(final / 1.5 + 0.25).sample / 2 + 0.5).clamp(0, 1) * 255
    assert (encoder.decode(final).float() - pixels).abs().max() < 1.01
    ok(dataset_tool, "decode", f"--source={data}", f"--dest={tmp_path / 'd'}")
    assert ImageFolderDataset(tmp_path / "d").image_shape == (3, 64, 64)
    snapshot, _ = train_on(data, tmp_path / "run", "--preview=0")
    assert load_network(snapshot).net.img_channels == 16
    assert load_network(snapshot).metadata["encoder"] == record_of(data)


def test_constant_scale_of_uvit(vae, photos, tmp_path):
    args = ["encode", f"--source={photos}", f"--dest={tmp_path / 'l.zip'}", f"--encoder={vae}", "--max-images=2"]
    ok(dataset_tool, *args, "--scale=0.18215", "--pixel-range=-1,1")
    dataset = ImageFolderDataset(tmp_path / "l.zip")
    stored = torch.from_numpy(dataset[0][0])[None]
    final = encoder_for(dataset).encode_latents(stored, torch.ones_like)
    torch.testing.assert_close(final, 0.18215 * (stored[:, :4] + stored[:, 4:]))


def test_deep_compression_autoencoder(dc_ae, photos, tmp_path):
    data = tmp_path / "l.zip"
    ok(dataset_tool, "encode", f"--source={photos}", f"--dest={data}", f"--encoder={dc_ae}", "--max-images=4")
    dataset = ImageFolderDataset(data)
    assert dataset.image_shape == (4, 32, 32) and dataset.name(0) == "00000/img-latent-00000000.npy"
    assert record_of(data)["name"] == "AutoencoderDCEncoder" and record_of(data)["kwargs"]["pixel_range"] == [-1, 1]
    x = torch.from_numpy(ImageFolderDataset(photos)[1][0])[None]
    model = model_of(dc_ae, "AutoencoderDC")
    with torch.inference_mode():
        raw = model.encode(x / 127.5 - 1).latent
        pixels = (model.decode(raw).sample / 2 + 0.5).clamp(0, 1) * 255
    torch.testing.assert_close(torch.from_numpy(dataset[1][0])[None], raw, rtol=1e-4, atol=1e-4)
    encoder = encoder_for(dataset)
    assert isinstance(encoder, AutoencoderDCEncoder)
    final = torch.cat([encoder.encode_latents(torch.from_numpy(item[0])[None]) for item in dataset])
    torch.testing.assert_close(final.std((0, 2, 3), correction=0), torch.full([4], FINAL_STD), atol=1e-3, rtol=0)
    assert (encoder.decode(final[1:2]).float() - pixels).abs().max() < 1.5
    ok(dataset_tool, "decode", f"--source={data}", f"--dest={tmp_path / 'd'}")
    assert np.abs(ImageFolderDataset(tmp_path / "d")[1][0] - pixels[0].numpy()).max() < 1.5
    snapshot, _ = train_on(data, tmp_path / "run", "--preview=0")
    ok(generate, f"--net={snapshot}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2")
    assert images_in(tmp_path / "out")["000000.png"].shape == (64, 64, 3)


def test_published_numbers_for_a_copy_of_the_published_vae(vae, vae16, photos, tmp_path):
    args = ["encode", f"--source={photos}", "--max-images=2", "--scale=published"]
    ok(dataset_tool, *args, f"--encoder={vae}", f"--dest={tmp_path / 'l.zip'}")
    assert record_of(tmp_path / "l.zip")["kwargs"]["raw_mean"] == StabilityVAEEncoder().raw_mean
    result = run_cli(dataset_tool, *args, f"--encoder={vae16}", f"--dest={tmp_path / 'x.zip'}")
    fails_with(result, "--scale=published is for copies of stabilityai/sd-vae-ft-mse")


@pytest.fixture
def unrecorded(tmp_path) -> Path:
    """Latents of 8 channels that do not say what made them."""
    rng = np.random.default_rng(0)
    files = {f"00000/{i}.npy": npy(rng.uniform(0.1, 1, size=[8, 8, 8]).astype(np.float32)) for i in range(5)}
    return make_dataset(tmp_path / "unrecorded.zip", files)


def test_archives_without_a_record(vae, unrecorded, tmp_path):
    line = f"Note: {unrecorded} does not say which VAE made its latents: assuming stabilityai/sd-vae-ft-mse"
    snapshot, output = train_on(unrecorded, tmp_path / "run", "--preview=0")
    assert output.count(line) == 1
    assert load_network(snapshot).metadata["encoder"]["kwargs"] == StabilityVAEEncoder().init_kwargs
    assert line.removeprefix("Note: ") in check(unrecorded)["notes"][0]
    # Named by the user: that VAE, and the statistics of these latents.
    snapshot, output = train_on(unrecorded, tmp_path / "named", f"--encoder={vae}")
    assert line not in output and "shows latents" not in output
    kwargs = load_network(snapshot).metadata["encoder"]["kwargs"]
    assert kwargs["vae_name"] == str(vae)
    raw = np.stack([image for image, _ in ImageFolderDataset(unrecorded)])
    np.testing.assert_allclose(kwargs["raw_mean"], raw[:, :4].mean((0, 2, 3)), rtol=1e-5)
    output = ok(train, f"--outdir={tmp_path / 'x'}", f"--data={unrecorded}", *RUN, "--encoder=raw", "--dry-run")
    assert "of no VAE that is known" in output and line not in output


def test_a_vae_that_has_moved(vae, latents, trained, tmp_path):
    """The user says where it is; a different one in its place is noticed."""
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(vae, folder)
    model = model_of(vae)
    model.decoder.conv_out.bias += 1
    model.save_pretrained(other)
    snapshot = load_network(trained)
    record = {**snapshot.encoder.init_kwargs, "vae_name": str(tmp_path / "gone")}
    save_network(tmp_path / "gone.safetensors", snapshot.net, StabilityVAEEncoder(**record), {})
    args = [f"--net={tmp_path / 'gone.safetensors'}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2"]
    fails_with(run_cli(generate, *args), f"the VAE {tmp_path / 'gone'} could not be loaded: no such file", "--encoder")
    ok(generate, *args, f"--encoder={copy}")
    ok(generate, f"--net={trained}", f"--outdir={tmp_path / 'in-place'}", "--seeds=0", "--steps=2")
    moved, in_place = (images_in(tmp_path / name)["000000.png"] for name in ("out", "in-place"))
    np.testing.assert_array_equal(moved, in_place)
    shutil.move(other, tmp_path / "gone")
    fails_with(run_cli(generate, *args), f"the VAE {tmp_path / 'gone'} is another than", "SHA-256", "--encoder")
    fails_with(run_cli(metrics_tool, "gen", *args[:1], "--ref=x"), "is another than")
    assert not same_latents(snapshot.encoder, StabilityVAEEncoder())
    assert same_latents(snapshot.encoder, StabilityVAEEncoder(**{**record, "vae_name": str(copy)}))


def test_hub_repositories_are_not_asked_for_files_of_strangers(vae, latents, trained, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **_kwargs: asked.append(args) or 1 / 0)
    snapshot = load_network(trained)
    kwargs = {**snapshot.encoder.init_kwargs, "vae_name": "stranger/vae"}
    net, data = tmp_path / "net.safetensors", tmp_path / "l.zip"
    save_network(net, snapshot.net, StabilityVAEEncoder(**kwargs), {})
    record = {"labels": None, "encoder": {"name": "StabilityVAEEncoder", "kwargs": kwargs}}
    with zipfile.ZipFile(latents) as old, zipfile.ZipFile(data, "w") as new:
        for name in old.namelist():
            new.writestr(name, json.dumps(record) if name == "dataset.json" else old.read(name))
    sampling = [f"--net={net}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2"]
    commands = [
        (net, generate, sampling),
        (net, metrics_tool, ["gen", f"--net={net}", "--ref=x"]),
        (data, dataset_tool, ["decode", f"--source={data}", f"--dest={tmp_path / 'd'}"]),
    ]
    for source, command, args in commands:
        fails_with(run_cli(command, *args), "the VAE stranger/vae could not", str(source), "--trust-encoder=1")
        assert not asked
        fails_with(run_cli(command, *args, "--trust-encoder=1"), "not fetched from the hub", exit_code=1)
        assert asked.pop()[0] == "stranger/vae"
    _, output = train_on(data, tmp_path / "run")
    assert not asked and "shows latents, not pixels: the VAE stranger/vae could not be loaded" in output
    # Those that are known are asked for, and what the user has fetched before is used.
    save_network(net, snapshot.net, StabilityVAEEncoder(**{**kwargs, "vae_name": "stabilityai/sdxl-vae"}), {})
    run_cli(generate, *sampling)
    assert asked.pop()[0] == "stabilityai/sdxl-vae"
    repo = cache / "models--stranger--vae"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    shutil.copytree(vae, repo / "snapshots" / "abc")
    save_network(net, snapshot.net, StabilityVAEEncoder(**kwargs), {})
    ok(generate, *sampling)
    assert not asked


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "eval", "kwargs": {}}, "dataset.json: unknown encoder 'eval'"),
        ({"name": "StabilityVAEEncoder"}, "dataset.json: its encoder has no name and arguments"),
        ({"name": "StabilityVAEEncoder", "kwargs": {"x": 1}}, "the arguments of its encoder do not fit"),
        ({"name": "StabilityVAEEncoder", "kwargs": {"scale": 0}}, "the arguments of its encoder do not fit"),
        ({"name": "StabilityVAEEncoder", "kwargs": {"pixel_range": [1, 0]}}, "the arguments of its encoder do not fit"),
        ({"name": "RawLatentEncoder", "kwargs": {"raw_mean": [0, 0], "raw_std": [1, 1]}}, "statistics of 2 channels"),
        (
            {"name": "StandardRGBEncoder", "kwargs": {}},
            "holds latents, and its dataset.json names a StandardRGBEncoder",
        ),
        ("vae", "encoder must have a name and kwargs"),
    ],
)
def test_records_that_do_not_fit(record, message, unrecorded, tmp_path):
    with zipfile.ZipFile(unrecorded, "a") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": None, "encoder": record}))
    fails_with(run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={unrecorded}", *RUN), message)


def test_options_that_do_not_fit(vae, vae16, photos, unrecorded, trained, tmp_path):
    base = [f"--outdir={tmp_path / 'run'}", *RUN]
    fails_with(run_cli(train, f"--data={photos}", *base, f"--encoder={vae}"), "is for latents", "holds pixels")
    fails_with(
        run_cli(train, f"--data={unrecorded}", *base, "--encoder=nowhere"), "the VAE nowhere could not be loaded"
    )
    args = ["decode", f"--source={unrecorded}", f"--dest={tmp_path / 'd'}", f"--encoder={vae16}"]
    fails_with(run_cli(dataset_tool, *args), f"the VAE {vae16} has latents of 16 channels, not 8", "--encoder")
    args = [f"--net={trained}", f"--outdir={tmp_path / 'out'}", f"--encoder={vae16}"]
    fails_with(run_cli(generate, *args), f"the VAE {vae16} has latents of 16 channels, not 4", "--encoder")
    save_network(tmp_path / "rgb.safetensors", tiny_network(), StandardRGBEncoder(), {})
    args = [f"--net={tmp_path / 'rgb.safetensors'}", f"--outdir={tmp_path / 'out'}", f"--encoder={vae}"]
    fails_with(run_cli(generate, *args), "--encoder is for networks that make latents of a VAE")
    encode = ["encode", f"--source={photos}", f"--dest={tmp_path / 'x.zip'}"]
    for scale in ("0", "inf", "some"):
        fails_with(run_cli(dataset_tool, *encode, f"--scale={scale}"), "--scale", repr(scale))
    shutil.copytree(vae, tmp_path / "odd")
    config = json.loads((vae / "config.json").read_text()) | {"_class_name": "VQModel"}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    fails_with(
        run_cli(dataset_tool, *encode, f"--encoder={tmp_path / 'odd'}"), "is an VQModel; known are AutoencoderKL"
    )
