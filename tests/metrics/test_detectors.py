"""Detectors: the interface, which all share, plain pixels, and loading by name."""

import hashlib
import json

import pytest
import torch
from measuring import uint8_images

from dnnlib.errors import UserError
from training.metrics.detectors import load_detector, load_detectors


@pytest.fixture(scope="module", params=["inception", "dinov2 torch", "dinov2 pil", "clip torch", "clip pil", "pixels"])
def detector(request, inception_file, dinov2_folder, clip_folder):
    name, _, resize = request.param.partition(" ")
    weights = {"inception": inception_file, "dinov2": dinov2_folder, "clip": clip_folder, "pixels": None}[name]
    return load_detector(name, "cpu", weights, resize or "torch")


def test_interface(detector, check):
    images = uint8_images(3, 3, 40, 30)
    features = detector(images)
    assert features.shape == (3, detector.feature_dim) and features.dtype == torch.float32
    assert not features.requires_grad
    assert detector(images[:0]).shape == (0, detector.feature_dim)
    for i in range(3):
        check(detector(images[i : i + 1])[0], features[i], 1e-5)
    others = torch.cat([images[:1], uint8_images(2, 3, 40, 30, seed=1)])
    assert torch.equal(detector(others)[0], features[0])
    assert not torch.equal(detector(others)[1], features[1])


def test_grayscale_is_gray_rgb(detector):
    gray = uint8_images(2, 1, 16, 16)
    assert torch.equal(detector(gray), detector(gray.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("images", "fragment"),
    [
        (uint8_images(2, 4, 8, 8), r"uint8 \[2, 4, 8, 8\]"),
        (uint8_images(2, 3, 8, 8).float(), r"float32 \[2, 3, 8, 8\]"),
        (uint8_images(3, 8, 8), r"uint8 \[3, 8, 8\]"),
    ],
)
def test_other_images(detector, images, fragment):
    with pytest.raises(UserError, match=f"not {fragment}"):
        detector(images)


def test_description(detector, inception_file, dinov2_folder, clip_folder):
    facts = detector.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["detector"] == detector.name
    folders = {"dinov2": dinov2_folder, "clip": clip_folder}
    files = {"inception": inception_file, **{name: path / "model.safetensors" for name, path in folders.items()}}
    path = files.get(detector.name)
    assert facts["weights"] == (None if path is None else hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (5, 13), (1, 3)])
def test_pixels(shape, check):
    # Each pixel as 8x8 equal ones can be divided into 8x8 equal cells.
    images = uint8_images(2, 3, *shape)
    enlarged = (images.double() / 255).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    cells = enlarged.reshape(2, 3, 8, shape[0], 8, shape[1]).mean(dim=(3, 5))
    check(load_detector("pixels", "cpu")(images), cells.flatten(1), 1e-6)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (dict(name="vgg"), r"unknown detector 'vgg' \(known: inception, dinov2, clip, pixels\)"),
        (dict(name="dinov2", resize="clean"), r"unknown resize mode 'clean' \(known: torch, pil\)"),
        (dict(name="inception", resize="pil"), "for the detectors dinov2 and clip, not for inception"),
        (dict(name="pixels", weights="a.pth"), "a.pth: the detector pixels has no weights"),
        (dict(name="inception", weights="nowhere.pth"), "nowhere.pth: no such file"),
        (dict(name="dinov2", weights="nowhere"), "nowhere/config.json: no such file"),
        (dict(name="clip", weights="nowhere"), "nowhere/config.json: no such file: the weights of clip are a folder"),
    ],
)
def test_wrong_arguments(arguments, fragment):
    with pytest.raises(UserError, match=fragment):
        load_detector(device="cpu", **arguments)


def test_detectors_of_metrics(dinov2_folder):
    """One per entry, however many metrics share it; the resize mode goes to DINOv2 alone."""
    detectors = load_detectors(["fd_pixels", "kd_dinov2", "prdc_dinov2"], "cpu", {"dinov2": dinov2_folder}, "pil")
    assert {entry: d.name for entry, d in detectors.items()} == {"fd_pixels": "pixels", "fd_dinov2": "dinov2"}
    assert detectors["fd_dinov2"].describe()["resize"].startswith("pil")
    with pytest.raises(UserError, match="--detector-weights=dinov2: no metric of --metrics uses it"):
        load_detectors(["fd_pixels"], "cpu", {"dinov2": dinov2_folder})
    with pytest.raises(UserError, match="--resize=pil: no metric of --metrics uses DINOv2 or CLIP"):
        load_detectors(["fd_pixels"], "cpu", resize="pil")
