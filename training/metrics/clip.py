"""The image model of CLIP, the detector of CMMD, through the transformers library (optional)."""

from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from dnnlib.files import file_sha256
from training.metrics.base import Detector
from training.metrics.pretrained import build, file_of, read_safetensors, read_settings, resize_bicubic
from training.metrics.weights import fetch_weights, read_tensors

SETTINGS = (  # those of vision_config in config.json that determine the features
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
PARTS = ("vision_model.", "visual_projection.")  # of the weights; the others are of the text model
POSITION_IDS = "vision_model.embeddings.position_ids"  # the numbers 0, 1, 2, ..., which older files hold


class CLIPDetector(Detector):
    """Image embeddings of CLIP (Radford et al. 2021), of unit length, as in CMMD (Jayasumana et al. 2024).

    Images are resized to the size of the network (336x336 for the published one; bicubic, with antialiasing, whatever
    their shape) and normalised with the mean and standard deviation that CLIP was trained with.

    Args:
        weights: folder of config.json and model.safetensors (or pytorch_model.bin) of the whole CLIP; None = those of
            ViT-L/14 at 336x336, which are downloaded.
        resize: 'torch' = in float32; 'pil' = by Pillow, which rounds to integers.

    Raises:
        UserError: transformers is not installed, a file is missing or damaged, or is not of a CLIP.
        RunError: a download failed.
    """

    name = "clip"

    def __init__(self, device: torch.device, weights: str | Path | None = None, resize: str = "torch"):
        super().__init__(device)
        if weights is None:
            config, tensors = fetch_weights("fd_clip")
        else:
            config = file_of(Path(weights), ("config.json",), self.name)
            tensors = file_of(Path(weights), ("model.safetensors", "pytorch_model.bin"), self.name)
        self.resize, self.sha256 = resize, file_sha256(tensors)
        self.net = _load_clip(config, tensors).to(device)
        self.feature_dim, self.size = self.net.config.projection_dim, self.net.config.image_size
        self.mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device).reshape(3, 1, 1)
        self.std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device).reshape(3, 1, 1)

    def describe(self) -> dict[str, Any]:
        size = f"{self.size}x{self.size}"
        return {"detector": self.name, "resize": f"{self.resize} bicubic, {size}", "weights": self.sha256}

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = resize_bicubic(images, self.size, self.resize) / 255
        embeddings = self.net(pixel_values=(x - self.mean) / self.std).image_embeds
        return embeddings / embeddings.norm(dim=1, keepdim=True)


def _load_clip(config: Path, tensors: Path) -> Any:
    """The image model of config.json and a file of weights, float32, in evaluation mode."""
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    except ImportError:
        raise UserError("the detector clip needs transformers: pip install transformers") from None
    settings = read_settings(config, "clip", "CLIP")
    vision = settings.get("vision_config")
    if type(vision) is not dict or "projection_dim" not in settings:
        raise UserError(f"{config}: not the config.json of a CLIP (it has no vision_config or projection_dim)")
    known = {key: vision[key] for key in SETTINGS if key in vision} | {"projection_dim": settings["projection_dim"]}
    read = read_safetensors if tensors.suffix == ".safetensors" else read_tensors
    state = {name: tensor for name, tensor in read(tensors).items() if name.startswith(PARTS) and name != POSITION_IDS}
    return build(CLIPVisionModelWithProjection, lambda: CLIPVisionConfig(**known), state, config, tensors, "CLIP")
