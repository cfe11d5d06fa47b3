"""DINOv2, the detector of FD-DINOv2, through the transformers library (optional)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.errors import UserError
from dnnlib.files import file_sha256
from training.metrics.base import Detector
from training.metrics.pretrained import build, file_of, read_safetensors, read_settings, resize_bicubic
from training.metrics.weights import fetch_weights

SETTINGS = (  # those of config.json that determine the features
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "layerscale_value",
    "qkv_bias",
    "use_swiglu_ffn",
)


class DINOv2Detector(Detector):
    """Class token of DINOv2 (Oquab et al. 2023) after the final norm, as in FD-DINOv2 (Stein et al. 2023).

    Images are resized to 224x224 (bicubic, with antialiasing) and normalised with the mean and standard deviation of
    ImageNet.

    Args:
        weights: folder of config.json and model.safetensors; None = those of ViT-L/14, which are downloaded.
        resize: 'torch' = in float32; 'pil' = by Pillow, which rounds to integers.

    Raises:
        UserError: transformers is not installed, a file is missing or damaged, or is not of a DINOv2.
        RunError: a download failed.
    """

    name, size = "dinov2", 224

    def __init__(self, device: torch.device, weights: str | Path | None = None, resize: str = "torch"):
        super().__init__(device)
        if weights is None:
            config, tensors = fetch_weights("fd_dinov2")
        else:
            config, tensors = (file_of(Path(weights), (n,), self.name) for n in ("config.json", "model.safetensors"))
        self.resize, self.sha256 = resize, file_sha256(tensors)
        self.net = _load_dinov2(config, tensors)
        self.feature_dim = self.net.config.hidden_size
        self._fit_positions()
        self.net.to(device)
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).reshape(3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).reshape(3, 1, 1)

    def describe(self) -> dict[str, Any]:
        return {"detector": self.name, "resize": f"{self.resize} bicubic, 224x224", "weights": self.sha256}

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = self.resized(images) / 255
        return self.net((x - self.mean) / self.std).last_hidden_state[:, 0]

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, 224, 224] of uint8 [N, 3, H, W], both from 0 to 255."""
        return resize_bicubic(images, self.size, self.resize)

    def _fit_positions(self) -> None:
        """Resample the position embeddings from the grid of the training images to that of 224x224.

        DINOv2's own code scales by a factor that is 0.1 patches too large, which shifts the sampling points, and the
        published features depend on it. transformers scales by the size instead, but only if the grids differ.
        """
        embeddings = self.net.embeddings
        positions = embeddings.position_embeddings
        patch = self.net.config.patch_size
        grid, wanted = self.net.config.image_size // patch, self.size // patch
        patches = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=(wanted + 0.1) / grid, mode="bicubic")
        fitted = torch.cat([positions[:, :1], patches.flatten(2).mT], dim=1)
        embeddings.position_embeddings = nn.Parameter(fitted, requires_grad=False)


def _load_dinov2(config: Path, tensors: Path) -> Any:
    """The network of config.json and model.safetensors, float32, in evaluation mode."""
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError:
        raise UserError("the detector dinov2 needs transformers: pip install transformers") from None
    settings = read_settings(config, "dinov2", "DINOv2")
    known = {key: settings[key] for key in SETTINGS if key in settings}
    return build(Dinov2Model, lambda: Dinov2Config(**known), read_safetensors(tensors), config, tensors, "DINOv2")
