"""Inception-v3, the detector of FID, kernel inception distance and inception score.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016 (arXiv 1512.00567). Names
of modules are those of the published weights.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from dnnlib.download import open_url, with_good_copy
from dnnlib.errors import DamagedFileError
from dnnlib.files import file_sha256
from training.config.metrics import METRIC_FILES
from training.metrics.base import Detector
from training.metrics.weights import check_finite, fetch_weights, read_state


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
        """Fold the batch normalisation into the convolution."""
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


Unit = tuple[str, int, int, int]  # name, output channels, kernel height and width


class Mixed(nn.Module):
    """A block of Inception-v3: several paths from the same input, their outputs concatenated.

    Args:
        paths: the steps of each path. A step is one unit, or several side by side whose outputs are concatenated.
        pool: pooling over 3x3 neighbours at the start of the last path, 'avg' or 'max'.
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
            # As in TensorFlow, the mean at an edge is over the neighbours inside the image.
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
    """Units in sequence, named prefix_1, prefix_2, ..., or just `prefix` if there is one."""
    names = [f"{prefix}_{i}" for i in range(1, len(units) + 1)] if len(units) > 1 else [prefix]
    return [[(name, *unit)] for name, unit in zip(names, units, strict=True)]


def _mixed_35(c_in: int, c_pool: int) -> Mixed:
    """Block at 35x35 (Fig. 5 of the paper, with a 5x5 for the first 3x3)."""
    paths = [
        _chain("branch1x1", (64, 1, 1)),
        _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        _chain("branch_pool", (c_pool, 1, 1)),
    ]
    return Mixed(c_in, paths, "avg")


def _mixed_17(c: int) -> Mixed:
    """Block at 17x17 (Fig. 6, n = 7)."""
    paths = [
        _chain("branch1x1", (192, 1, 1)),
        _chain("branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
        _chain("branch_pool", (192, 1, 1)),
    ]
    return Mixed(768, paths, "avg")


def _mixed_8(c_in: int, pool: str) -> Mixed:
    """Block at 8x8 (Fig. 7)."""

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
    """Inception-v3 with the classifier of 2015, which has 1008 outputs.

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


def _load(source: str, published: bool) -> tuple[InceptionV3, str]:
    """The network with the weights of a file, and the file's SHA-256."""
    (path,) = fetch_weights("fid") if published else [Path(open_url(source, return_filename=True))]
    sha256 = file_sha256(path)
    digits = re.search(r"-([0-9a-f]{8})\.pth$", source)  # torch's convention: the start of the checksum
    if digits is not None and not sha256.startswith(digits[1]):
        raise DamagedFileError(
            f"{path}: checksum mismatch: SHA-256 is {sha256}, not {digits[1]}...: delete it and download it again"
        )
    net = InceptionV3().eval().requires_grad_(False)
    net.load_state_dict(read_state(path, net.state_dict()))
    check_finite(path, net)
    for unit in net.modules():
        if isinstance(unit, ConvUnit):
            unit.fold()
    return net, sha256


class InceptionDetector(Detector):
    """Pool features of Inception-v3 as of 2015-12-05, which FID is defined by (Heusel et al. 2017).

    Images are resized to 299x299 by TensorFlow 1's bilinear interpolation and scaled to [-1, 1).

    Args:
        weights: file of a state dict; None = the published one, which is downloaded.

    Raises:
        UserError: the file is missing or damaged, or holds other weights.
        RunError: the download failed.
    """

    name, feature_dim = "inception", 2048

    def __init__(self, device: torch.device, weights: str | Path | None = None):
        super().__init__(device)
        source = str(weights) if weights is not None else METRIC_FILES["fid"][0]
        net, self.sha256 = with_good_copy(source, lambda: _load(source, published=weights is None))
        self.net = cast(Any, net).to(device=device, memory_format=torch.channels_last)

    def describe(self) -> dict[str, Any]:
        return {"detector": self.name, "resize": "TensorFlow 1 bilinear, 299x299", "weights": self.sha256}

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [N, 1008] of pool features [N, 2048], without biases, as the inception score is calculated."""
        return features @ self.net.fc.weight.T

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        x = (resize_tf1(images.float(), 299) - 128) / 128
        return self.net(x.contiguous(memory_format=torch.channels_last))


def resize_tf1(x: torch.Tensor, size: int) -> torch.Tensor:
    """[N, C, H, W] -> [N, C, size, size] by bilinear interpolation as in TensorFlow 1.

    Output pixel i is read at i * H / size: without the half-pixel offset of pixel centres, and without antialiasing.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(size, device=x.device) * (n / size)
        low = at.long()
        weight = (at - low).unflatten(0, [-1] + [1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), weight)
    return x
