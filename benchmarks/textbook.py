"""The published computations written plainly: what the benchmarks compare with, and nothing else uses."""

import copy
import io
import json
import math
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

from training.phema import power_function_beta
from training.toy.data import GaussianMixture

# ---------------------------------------------------------------------------------------------------------
# EDM2's denoiser, arXiv 2312.02696. Its state dict is that of `training.networks_edm2.Precond`.


def normalize(x: torch.Tensor, dim: list[int] | None = None, eps: float = 1e-4) -> torch.Tensor:
    """Eq. 47, over all dimensions but the first if not told."""
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    norm = eps + norm * math.sqrt(norm.numel() / x.numel())
    return x / norm.to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    Na, Nb = a.shape[1], b.shape[1]
    C = math.sqrt((Na + Nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([C / math.sqrt(Na) * (1 - t) * a, C / math.sqrt(Nb) * t * b], dim=1)


def resample(x: torch.Tensor, mode: str) -> torch.Tensor:
    """With the filter [1, 1]."""
    if mode == "keep":
        return x
    f = torch.full([x.shape[1], 1, 2, 2], 0.25, dtype=x.dtype, device=x.device)
    if mode == "down":
        return F.conv2d(x, f, groups=x.shape[1], stride=2)
    return F.conv_transpose2d(x, f * 4, groups=x.shape[1], stride=2)


class MPFourier(nn.Module):
    def __init__(self, num_channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.outer(x, self.freqs) + self.phases).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Normalises its weight in every forward pass: the effective one always, in training also the stored one."""

    def __init__(self, in_channels: int, out_channels: int, *kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: torch.Tensor, gain: float | torch.Tensor = 1) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))
        w = normalize(self.weight)
        w = (w * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, cemb: int, flavor: str, mode: str = "keep", attention: bool = False):
        super().__init__()
        self.flavor, self.mode = flavor, mode
        self.num_heads = max(cout // 64, 1) if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(cout if flavor == "enc" else cin, cout, 3, 3)
        self.emb_linear = MPConv(cemb, cout)
        self.conv_res1 = MPConv(cout, cout, 3, 3)
        self.conv_skip = MPConv(cin, cout, 1, 1) if cin != cout else None
        self.attn_qkv = MPConv(cout, cout * 3, 1, 1) if attention else None
        self.attn_proj = MPConv(cout, cout, 1, 1) if attention else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        x = resample(x, self.mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=[1])
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None])
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, t=0.3)
        if self.attn_qkv is not None and self.attn_proj is not None:
            y = self.attn_qkv(x)
            y = y.reshape(y.shape[0], self.num_heads, -1, 3, y.shape[2] * y.shape[3])
            q, k, v = normalize(y, dim=[2]).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", w, v)
            x = mp_sum(x, self.attn_proj(y.reshape(*x.shape)), t=0.3)
        return x.clip(-256, 256)


class UNet(nn.Module):
    def __init__(
        self,
        resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (16, 8),
    ):
        super().__init__()
        self.label_dim = label_dim
        cblock = [model_channels * m for m in (1, 2, 3, 4)]
        cemb = max(cblock)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cblock[0])
        self.emb_noise = MPConv(cblock[0], cemb)
        self.emb_label = MPConv(label_dim, cemb) if label_dim > 0 else None
        self.enc = nn.ModuleDict()
        cout = img_channels + 1
        skips = []
        for level, channels in enumerate(cblock):
            res = resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(cout, channels, 3, 3)
                cout = channels
            else:
                self.enc[f"{res}x{res}_down"] = Block(cout, cout, cemb, "enc", "down")
            skips.append(cout)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = Block(cout, channels, cemb, "enc", attention=attention)
                cout = channels
                skips.append(cout)
        self.dec = nn.ModuleDict()
        for level, channels in reversed(list(enumerate(cblock))):
            res = resolution >> level
            if level == len(cblock) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(cout, cout, cemb, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = Block(cout, cout, cemb, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = Block(cout, cout, cemb, "dec", "up")
            for i in range(num_blocks + 1):
                cin = cout + skips.pop()
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = Block(cin, channels, cemb, "dec", attention=attention)
                cout = channels
        self.out_conv = MPConv(cout, img_channels, 3, 3)

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(self.label_dim)), t=0.5)
        emb = mp_silu(emb).to(x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, module in self.enc.items():
            x = module(x) if "conv" in name else module(x, emb)
            skips.append(x)
        for name, module in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop())
            x = module(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Precond(nn.Module):
    """D(x; sigma, labels) of images [N, img_channels, resolution, resolution], the U-Net in `dtype`."""

    def __init__(
        self,
        resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_data: float = 0.5,
        dtype: torch.dtype = torch.float32,
        **unet_kwargs,
    ):
        super().__init__()
        self.sigma_data = sigma_data
        self.dtype = dtype
        self.unet = UNet(resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(128)
        self.logvar_linear = MPConv(128, 1)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None, return_logvar: bool = False
    ):
        sigma = sigma.reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        c_noise = sigma.flatten().log() / 4
        D_x = c_skip * x + c_out * self.unet((c_in * x).to(self.dtype), c_noise, labels).float()
        if not return_logvar:
            return D_x
        return D_x, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------
# Post-hoc reconstruction


@torch.no_grad()
def reconstruct_pickles(
    inputs: Sequence[Path], coefs: Sequence[Sequence[float]], outputs: Sequence[Path]
) -> list[torch.nn.Module]:
    """Read pickled networks whole, sum up each parameter of each output in float32, and write float16 pickles.

    Args:
        coefs: weights of the inputs, one row per output.
    """
    sums: list[torch.nn.Module] = []
    for i, path in enumerate(inputs):
        with open(path, "rb") as f:
            net = pickle.load(f)["ema"].float()
        if not sums:
            sums = [copy.deepcopy(net) for _ in outputs]
            for total in sums:
                for p in total.parameters():
                    p.zero_()
        for total, row in zip(sums, coefs, strict=True):
            for dst, src in zip(total.parameters(), net.parameters(), strict=True):
                dst += row[i] * src
    for total, path in zip(sums, outputs, strict=True):
        with open(path, "wb") as f:
            pickle.dump({"ema": total.half()}, f)
    return sums


# ---------------------------------------------------------------------------------------------------------
# Training


class PlainOptimization:
    """What follows the gradients: non-finite ones replaced, Adam, power-function EMAs; one parameter at a time."""

    def __init__(self, net: torch.nn.Module, lr: float, stds: Sequence[float]):
        self.net = net
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99), foreach=False)
        self.stds = stds
        self.emas = [[p.detach().clone() for p in net.parameters()] for _ in stds]

    @torch.no_grad()
    def step(self, nimg: int, batch: int) -> None:
        for p in self.net.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
        self.optimizer.step()
        for std, averages in zip(self.stds, self.emas, strict=True):
            beta = float(power_function_beta(std, nimg, batch))
            for average, p in zip(averages, self.net.parameters(), strict=True):
                average.lerp_(p, 1 - beta)


# ---------------------------------------------------------------------------------------------------------
# The toy example


class PlainMixtureScore:
    """Score of a mixture under noise: noisy covariances through their eigenvectors, sums with einsum."""

    def __init__(self, distribution: GaussianMixture):
        self.phi, self.mu = distribution.phi, distribution.mu
        self.variances, self.axes = torch.linalg.eigh(distribution.Sigma)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = self.variances + sigma[:, None, None] ** 2  # [N, K, 2], along the eigenvectors
        z = torch.einsum("kji,nkj->nki", self.axes, self.mu - x[:, None])
        density = self.phi * (-(z**2 / variance).sum(2) / 2).exp() / (2 * math.pi * variance.prod(2).sqrt())
        gradient = torch.einsum("nk,kij,nkj->ni", density, self.axes, z / variance)
        return gradient / density.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------
# Datasets and metrics


class PlainDataset(torch.utils.data.Dataset):
    """Reads an item through one zipfile object, and decodes it by np.load or Pillow."""

    def __init__(self, path: Path):
        self.path = path
        self.archive: zipfile.ZipFile | None = None
        with zipfile.ZipFile(path) as archive:
            self.names = sorted(name for name in archive.namelist() if name.endswith((".png", ".npy")))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
        name = self.names[idx]
        with self.archive.open(name) as f:
            if name.endswith(".npy"):
                image = np.load(f)
            else:
                image = np.array(PIL.Image.open(f)).transpose(2, 0, 1)
        return image.copy(), np.zeros([0], dtype=np.float32)


def convert_one_by_one(source: Path, dest: Path, resolution: int) -> None:
    """Image files of a folder, centre-cropped and resized, into a ZIP file of PNG files that are not compressed."""
    with zipfile.ZipFile(dest, "w", zipfile.ZIP_STORED) as archive:
        for i, path in enumerate(sorted(source.iterdir())):
            image = np.array(PIL.Image.open(path).convert("RGB"))
            size = min(image.shape[:2])
            y, x = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
            square = PIL.Image.fromarray(image[y : y + size, x : x + size])
            resized = square.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)
            f = io.BytesIO()
            resized.save(f, format="png", compress_level=0)
            archive.writestr(f"{i // 1000:05d}/img{i:08d}.png", f.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))


def frechet_by_matrix_root(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root))
