"""Feature extractors for metrics: Inception-v3, DINOv2 and plain pixels."""

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from dnnlib.download import offline, open_url
from dnnlib.errors import UserError, one_line
from dnnlib.files import file_sha256
from training.config.metrics import DETECTORS, METRIC_FILES, RESIZE_MODES

DINOV2_SETTINGS = (  # what config.json may say, as far as it concerns the features
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


class Detector:
    """Images -> features, one image independently of the others.

    Args:
        device: where the detector computes and its images must be.

    Attributes:
        name: as `load_detector` takes it.
        feature_dim: number of features, D.
    """

    name: str
    feature_dim: int

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, C, H, W] on the detector's device, RGB or grayscale (C = 1) -> float32 [N, D].

        Raises:
            UserError: images of another type or number of channels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise UserError(f"features are of RGB or grayscale images, uint8 [N, 3 or 1, H, W]; these are {kind}")
        if len(images) == 0:  # a process may get none
            return torch.empty([0, self.feature_dim], device=self.device)
        with torch.no_grad():
            return self._features(images.expand(-1, 3, -1, -1))

    def describe(self) -> dict[str, Any]:
        """What determines the features, as plain JSON values: `detector`, `resize`, and `weights` (SHA-256)."""
        raise NotImplementedError

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, D]."""
        raise NotImplementedError


def load_detector(
    name: str, device: torch.device | str, weights: str | Path | None = None, resize: str = "torch"
) -> Detector:
    """The detector called 'inception', 'dinov2' or 'pixels', ready for use.

    Args:
        weights: file (inception) or folder (dinov2) of the weights; None = those of the published metrics, which are
            fetched once.
        resize: how dinov2 enlarges or reduces its images, 'torch' or 'pil'; the others have one way only.

    Raises:
        UserError: no such detector or resize mode, weights that are not to be had, or that do not fit.
        RunError: the weights could not be fetched now.
    """
    if name not in DETECTORS:
        raise UserError(f"unknown detector {name!r}: there are {', '.join(DETECTORS)}")
    if resize not in RESIZE_MODES:
        raise UserError(f"unknown resize mode {resize!r}: there are {', '.join(RESIZE_MODES)}")
    if resize != "torch" and name != "dinov2":
        raise UserError(f"resize mode {resize!r} is for the detector dinov2, not for {name}")
    device = torch.device(device)
    if name == "inception":
        return InceptionDetector(device, weights)
    if name == "dinov2":
        return DINOv2Detector(device, weights, resize)
    if weights is not None:
        raise UserError(f"{weights}: the detector pixels has no weights")
    return PixelDetector(device)


# ---------------------------------------------------------------------------------------------------------
# Inception-v3


class ConvUnit(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int = 1, pad: bool = False):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn: Any = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Make the batch normalisation part of the convolution."""
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


Unit = tuple[str, int, int, int]  # name, output channels, kernel height and width


class Mixed(nn.Module):
    """A module of Inception-v3: several paths from the same input, their outputs concatenated.

    Args:
        paths: the steps of each path. A step is one unit, or several side by side whose outputs are concatenated.
        pool: what the last path begins with: 'avg' or 'max' of 3x3 neighbours.
        reduce: halve the resolution: the last unit of every path and the pooling have stride 2 and no padding.
    """

    def __init__(self, c_in: int, paths: Sequence[Sequence[Sequence[Unit]]], pool: str, reduce: bool = False):
        super().__init__()
        self.paths = [[[name for name, *_ in step] for step in path] for path in paths]
        self.pool, self.reduce = pool, reduce
        for path in paths:
            channels = c_in
            for step in path:
                last = reduce and step is path[-1]
                for name, c_out, height, width in step:
                    self.add_module(name, ConvUnit(channels, c_out, (height, width), 2 if last else 1, pad=not last))
                channels = sum(c_out for _, c_out, *_ in step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reduce:
            pooled = F.max_pool2d(x, 3, 2)
        elif self.pool == "max":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            # As TensorFlow does it: the mean of the neighbours that there are.
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        outputs = []
        for path in self.paths:
            y = pooled if path is self.paths[-1] else x
            for step in path:
                parts = [self.get_submodule(name)(y) for name in step]
                y = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _chain(prefix: str, *units: tuple[int, int, int]) -> list[list[Unit]]:
    """Units one after the other, called prefix_1, prefix_2, ..., or `prefix` where there is just one."""
    names = [f"{prefix}_{i}" for i in range(1, len(units) + 1)] if len(units) > 1 else [prefix]
    return [[(name, *unit)] for name, unit in zip(names, units, strict=True)]


def _mixed_35(c_in: int, c_pool: int) -> Mixed:
    """At 35x35 (Szegedy et al. 2016, Fig. 5, its first 3x3 being a 5x5)."""
    paths = [
        _chain("branch1x1", (64, 1, 1)),
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        _chain("branch_pool", (c_pool, 1, 1)),
    ]
    return Mixed(c_in, paths, "avg")


def _mixed_17(c: int) -> Mixed:
    """At 17x17 (Fig. 6, n = 7)."""
    paths = [
        _chain("branch1x1", (192, 1, 1)),
        _chain("branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
        _chain("branch_pool", (192, 1, 1)),
    ]
    return Mixed(768, paths, "avg")


def _mixed_8(c_in: int, pool: str) -> Mixed:
    """At 8x8 (Fig. 7)."""

    def fork(prefix: str, a: str, b: str) -> list[Unit]:
        return [(f"{prefix}_{a}", 384, 1, 3), (f"{prefix}_{b}", 384, 3, 1)]

    paths = [
        _chain("branch1x1", (320, 1, 1)),
        [[("branch3x3_1", 384, 1, 1)], fork("branch3x3", "2a", "2b")],
        [*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), fork("branch3x3dbl", "3a", "3b")],
        _chain("branch_pool", (192, 1, 1)),
    ]
    return Mixed(c_in, paths, pool)


class InceptionV3(nn.Module):
    """Inception-v3 as trained in 2015 (Szegedy et al. 2016, "Rethinking the Inception Architecture").

    float32 [N, 3, 299, 299] in [-1, 1] -> pool features [N, 2048].
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3), pad=True)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3))
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        paths = [
            _chain("branch3x3", (384, 3, 3)),
            _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
            [],
        ]
        self.Mixed_6a = Mixed(288, paths, "max", reduce=True)
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        paths = [
            _chain("branch3x3", (192, 1, 1), (320, 3, 3)),
            _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)),
            [],
        ]
        self.Mixed_7a = Mixed(768, paths, "max", reduce=True)
        self.Mixed_7b = _mixed_8(1280, "avg")
        self.Mixed_7c = _mixed_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


class InceptionDetector(Detector):
    """Pool features of Inception-v3 in its version of 2015-12-05, as FID has them (Heusel et al. 2017).

    Images are resized to 299x299 by TensorFlow 1's bilinear interpolation and scaled to [-1, 1).

    Args:
        weights: file of a state dict; None = the published one, which is fetched.

    Raises:
        UserError: the file is not to be had, or is not one of these weights.
    """

    name, feature_dim = "inception", 2048

    def __init__(self, device: torch.device, weights: str | Path | None = None):
        super().__init__(device)
        source = str(weights) if weights is not None else METRIC_FILES["fid"][0]
        (path,) = _fetched("fid") if weights is None else [Path(open_url(weights, return_filename=True))]
        self.sha256 = file_sha256(path)
        digits = re.search(r"-([0-9a-f]{8})\.pth$", source)  # such names tell how the sum begins
        if digits is not None and not self.sha256.startswith(digits[1]):
            raise UserError(f"{path}: its SHA-256 is {self.sha256}, not {digits[1]}...: delete it and fetch it again")
        net = InceptionV3().eval().requires_grad_(False)
        net.load_state_dict(_read_state(path, net.state_dict()))
        _check_finite(path, net)
        for unit in net.modules():
            if isinstance(unit, ConvUnit):
                unit.fold()
        self.net = cast(Any, net).to(device=device, memory_format=torch.channels_last)

    def describe(self) -> dict[str, Any]:
        return {"detector": self.name, "resize": "TensorFlow 1 bilinear, 299x299", "weights": self.sha256}

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Pool features [N, 2048] -> logits of 1008 classes without the biases, as the inception score takes them."""
        return features @ self.net.fc.weight.T

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = (resize_tf1(images.float(), 299) - 128) / 128
        return self.net(x.contiguous(memory_format=torch.channels_last))


def resize_tf1(x: torch.Tensor, size: int) -> torch.Tensor:
    """[N, C, H, W] -> [N, C, size, size] by bilinear interpolation as in TensorFlow 1.

    Output pixel i is read at i * H / size: pixel centres are not half a pixel in, and smaller images are not smoothed.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, device=x.device) * (n / size)
        low = at.long()
        weight = (at - low).unflatten(0, [-1] + [1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), weight)
    return x


# ---------------------------------------------------------------------------------------------------------
# DINOv2


class DINOv2Detector(Detector):
    """Class token of DINOv2 after the final norm (Oquab et al. 2023), as FD-DINOv2 has it (Stein et al. 2023).

    Images are resized to 224x224 (bicubic, smoothed where they get smaller) and normalised with the mean and standard
    deviation of ImageNet.

    Args:
        weights: folder of config.json and model.safetensors; None = those of ViT-L/14, which are fetched.
        resize: 'torch' = in float32; 'pil' = by Pillow, to whole numbers.

    Raises:
        UserError: transformers is not installed, a file is not to be had, or is not one of a DINOv2.
    """

    name, size = "dinov2", 224

    def __init__(self, device: torch.device, weights: str | Path | None = None, resize: str = "torch"):
        super().__init__(device)
        config, tensors = _fetched("fd_dinov2") if weights is None else _in_folder(Path(weights))
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
        x = self._resized(images) / 255
        return self.net((x - self.mean) / self.std).last_hidden_state[:, 0]

    def _resized(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, 3, 224, 224]."""
        if self.resize == "pil":
            out = np.empty([len(images), self.size, self.size, 3], dtype=np.uint8)
            for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
                picture = PIL.Image.fromarray(np.ascontiguousarray(image))
                out[i] = np.asarray(picture.resize((self.size, self.size), PIL.Image.Resampling.BICUBIC))
            return torch.from_numpy(out).permute(0, 3, 1, 2).to(self.device).float()
        x = images.float()
        if self.device.type == "mps":
            x = x.cpu()  # torch 2.6 has no smoothed interpolation on MPS
        size = (self.size, self.size)
        return F.interpolate(x, size=size, mode="bicubic", antialias=True).to(self.device)

    def _fit_positions(self) -> None:
        """Bring the position embeddings from the grid of the training images to that of 224x224.

        DINOv2's own code passes a scale factor that is 0.1 patches larger than the ratio of the grids, which shifts
        the points that are read. transformers passes the size instead; it leaves alone embeddings that fit.
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
    """The network of config.json and model.safetensors, float32."""
    try:
        from transformers import Dinov2Config, Dinov2Model
        from transformers.utils import logging
    except ImportError:
        raise UserError("the detector dinov2 needs transformers: pip install transformers") from None
    try:
        settings = json.loads(config.read_text())
        if type(settings) is not dict or settings.get("model_type") != "dinov2":
            raise ValueError("its model_type is not dinov2")
    except (ValueError, RecursionError) as err:
        raise UserError(f"{config}: not the config.json of a DINOv2 ({one_line(err)})") from None
    try:
        state = safetensors.torch.load_file(tensors)
    except (safetensors.SafetensorError, ValueError) as err:
        raise UserError(f"{tensors}: damaged or truncated ({one_line(err)}): copy it again") from None
    # What does not fit is told below.
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        net, found = cast(Any, Dinov2Model).from_pretrained(
            None,
            config=Dinov2Config(**{key: settings[key] for key in DINOV2_SETTINGS if key in settings}),
            state_dict=state,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as err:  # transformers and what it is built on have many ways to say that a value is wrong
        raise UserError(f"{config}: describes no DINOv2 that can be built ({one_line(err)})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    wrong = [f"{name} has another shape" for name, *_ in found["mismatched_keys"]]
    _check_fit(tensors, found["missing_keys"], found["unexpected_keys"], wrong)
    _check_finite(tensors, net)
    return net.eval().requires_grad_(False).float()


# ---------------------------------------------------------------------------------------------------------
# Pixels


class PixelDetector(Detector):
    """Pixels in [0, 1], averaged over the cells of an 8x8 grid: a stand-in that needs no weights.

    D = 192 for images of every size; those smaller than 8x8 are enlarged.
    """

    name, size, feature_dim = "pixels", 8, 192

    def describe(self) -> dict[str, Any]:
        return {"detector": self.name, "resize": "average, 8x8", "weights": None}

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        rows, columns = (self._averages(n, images.device) for n in images.shape[2:])
        return (rows @ (images.float() / 255 @ columns.T)).flatten(1)

    def _averages(self, n: int, device: torch.device) -> torch.Tensor:
        """float32 [8, n]: what each of n pixels contributes to the means over 8 equal parts of the line."""
        edges = torch.arange(self.size + 1, device=device) * (n / self.size)
        start = torch.arange(n, device=device)
        overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
        return overlap.clamp(min=0) * (self.size / n)


# ---------------------------------------------------------------------------------------------------------
# Weights


def _fetched(metric: str) -> list[Path]:
    """The published files of a metric.

    Raises:
        UserError, RunError: one is not to be had.
    """
    try:
        return [Path(open_url(url, return_filename=True)) for url in METRIC_FILES[metric]]
    except UserError as err:
        hint = f"; all files at once: python snapshot_tool.py prefetch {metric}" if offline() else ""
        raise UserError(f"{err}{hint}") from None


def _in_folder(folder: Path) -> list[Path]:
    """config.json and model.safetensors.

    Raises:
        UserError: one is missing.
    """
    paths = [folder / "config.json", folder / "model.safetensors"]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; the weights of dinov2 are a folder that holds it")
    return paths


def _read_state(path: Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict saved by torch.save, with the names and shapes of `wanted`.

    Raises:
        UserError: the file is something else.
    """
    try:
        # The older of torch's two formats cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # torch.load has many ways to say that a file is damaged or holds code, few of them readable
        raise UserError(f"{path}: no weights saved by torch.save, or damaged: copy or fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: no weights saved by torch.save (it holds other things than named tensors)")
    shapes = {name: list(tensor.shape) for name, tensor in wanted.items()}
    wrong = [
        f"{name} is {list(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state and list(state[name].shape) != shape
    ]
    _check_fit(path, shapes.keys() - state.keys(), state.keys() - shapes.keys(), wrong)
    return state


def _check_fit(path: Path, missing: Iterable[str], unexpected: Iterable[str], wrong: Sequence[str]) -> None:
    """
    Raises:
        UserError: names are missing or too many, or shapes are `wrong`.
    """
    lists = {"without ": sorted(missing), "with ": sorted(unexpected), "": sorted(wrong)}
    for what, names in lists.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path}: not the weights of this network ({what}{one_line(names[0])}{more})")


def _check_finite(path: Path, net: nn.Module) -> None:
    """
    Raises:
        UserError: a weight is NaN or infinite.
    """
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity: copy it again")
