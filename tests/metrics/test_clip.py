"""CLIP as a detector: against the whole model, folders of weights as users have them, and what is refused."""

import math

import pytest
import safetensors.torch
import torch
from conftest import write_clip
from measuring import uint8_images

from dnnlib.errors import UserError
from training.config.metrics import METRIC_FILES
from training.metrics.detectors import load_detector


def test_embeddings_are_those_of_the_whole_model(clip_folder, check):
    """As CLIP itself embeds images that have its size already, but of unit length."""
    from transformers import CLIPModel

    images = uint8_images(3, 3, 28, 28)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=(images / 255 - mean) / std).pooler_output
        expected = model.visual_projection(pooled)
    detector = load_detector("clip", "cpu", clip_folder)
    features = detector(images)
    assert detector.feature_dim == 12
    check(features, expected / expected.norm(dim=1, keepdim=True), 1e-6)
    check(features.norm(dim=1), torch.ones(3), 1e-6)


def test_files_of_torch(clip_folder, tmp_path, check):
    """The published weights are such a file."""
    older = load_detector("clip", "cpu", write_clip(tmp_path / "older", "pytorch_model.bin"))
    images = uint8_images(2, 3, 40, 30)
    check(older(images), load_detector("clip", "cpu", clip_folder)(images), 1e-6)


def test_resize_modes_are_distinguished(clip_folder):
    facts = [load_detector("clip", "cpu", clip_folder, resize).describe() for resize in ("torch", "pil")]
    assert [fact["resize"] for fact in facts] == ["torch bicubic, 28x28", "pil bicubic, 28x28"]


def test_what_is_refused(tmp_path):
    def refused(folder, fragment):
        with pytest.raises(UserError, match=fragment) as err:
            load_detector("clip", "cpu", folder)
        assert "\n" not in str(err.value)

    refused(
        write_clip(tmp_path / "a", model_type="siglip"), "not the config.json of a CLIP .its model_type is not clip"
    )
    refused(write_clip(tmp_path / "b", vision_config=None), "has no vision_config")
    refused(write_clip(tmp_path / "c", projection_dim=13), "not the weights of this network")
    folder = write_clip(tmp_path / "d")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0, 0] = math.nan
    safetensors.torch.save_file(state, folder / "model.safetensors")
    refused(folder, "visual_projection.weight holds NaN or infinity")
    del state["visual_projection.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors")
    refused(folder, r"not the weights of this network \(missing visual_projection.weight\)")
    (folder / "model.safetensors").write_bytes(b"junk")
    refused(folder, "model.safetensors: damaged or truncated")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: no such file")
    (folder / "pytorch_model.bin").write_bytes(b"junk")
    refused(folder, "pytorch_model.bin: not weights saved by torch.save, or damaged")


def test_published_weights_are_fetched(clip_folder, tmp_path, monkeypatch, check):
    """From the hub, as a file of torch."""
    folder, asked = write_clip(tmp_path / "hub", "pytorch_model.bin"), []

    def open_url(url, **_kwargs):
        asked.append(url)
        return str(folder / url.rsplit("/", 1)[1])

    monkeypatch.setattr("training.metrics.weights.open_url", open_url)
    images = uint8_images(1, 3, 30, 30)
    check(load_detector("clip", "cpu")(images), load_detector("clip", "cpu", clip_folder)(images), 1e-6)
    assert asked == METRIC_FILES["fd_clip"] and all(url.startswith("hf://openai/") for url in asked)
