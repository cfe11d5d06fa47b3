"""The published computations written plainly: what the benchmarks compare with, and nothing else uses."""

import copy
import math
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import scipy.linalg
import torch

from training.networks_edm2 import Block, MPConv, Precond, mp_cat, mp_silu, mp_sum, resample
from training.phema import power_function_beta
from training.toy_data import GaussianMixture

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
# Networks and training


class PlainConv(torch.nn.Module):
    """Convolution whose weights are normalised in every evaluation; in training, those stored are, too."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())

    def forward(self, x: torch.Tensor, gain: float | torch.Tensor = 1) -> torch.Tensor:
        w = self.weight.to(torch.float32)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(plain_normalize(w))
        w = plain_normalize(w)
        w = (w * (gain / np.sqrt(w[0].numel()))).to(x.dtype)
        if w.ndim == 2:
            return x @ w.t()
        return torch.nn.functional.conv2d(x, w, padding=w.shape[-1] // 2)


def plain_normalize(x: torch.Tensor, dim: Sequence[int] | None = None) -> torch.Tensor:
    """To unit root mean square over `dim`, all dimensions but the first by default."""
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    norm = 1e-4 + norm * np.sqrt(norm.numel() / x.numel())
    return x / norm.to(x.dtype)


class PlainBlock(torch.nn.Module):
    """A `Block` with attention by einsum."""

    def __init__(self, block: Block):
        super().__init__()
        self.original = [block]  # out of reach for parameters()
        self.emb_gain = torch.nn.Parameter(block.emb_gain.detach().clone())
        for name, child in block.named_children():
            assert isinstance(child, MPConv)
            setattr(self, name, PlainConv(child.weight))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        block = self.original[0]
        x = resample(x, f=block.resample_filter, mode=block.resample_mode)
        if block.flavor == "enc":
            if block.conv_skip is not None:
                x = self.conv_skip(x)
            x = plain_normalize(x, dim=[1])
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c.unsqueeze(2).unsqueeze(3).to(y.dtype))
        y = self.conv_res1(y)
        if block.flavor == "dec" and block.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, t=block.res_balance)
        if block.num_heads:
            y = self.attn_qkv(x)
            y = y.reshape(y.shape[0], block.num_heads, -1, 3, y.shape[2] * y.shape[3])
            q, k, v = plain_normalize(y, dim=[2]).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / np.sqrt(q.shape[2])).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", w, v)
            x = mp_sum(x, self.attn_proj(y.reshape(*x.shape)), t=block.attn_balance)
        if block.clip_act is not None:
            x = x.clip_(-block.clip_act, block.clip_act)
        return x


class PlainPrecond(torch.nn.Module):
    """A `Precond` whose layers are the plain ones, with a copy of its weights, in float32 and contiguous NCHW."""

    def __init__(self, net: Precond):
        super().__init__()
        self.original = [net]
        unet = net.unet
        self.out_gain = torch.nn.Parameter(unet.out_gain.detach().clone())
        self.emb_noise = PlainConv(unet.emb_noise.weight)
        self.emb_label = PlainConv(unet.emb_label.weight) if unet.emb_label is not None else None
        self.enc = torch.nn.ModuleDict({name: self._plain(module) for name, module in unet.enc.items()})
        self.dec = torch.nn.ModuleDict({name: self._plain(module) for name, module in unet.dec.items()})
        self.out_conv = PlainConv(unet.out_conv.weight)
        self.logvar_linear = PlainConv(net.logvar_linear.weight)

    @staticmethod
    def _plain(module: torch.nn.Module) -> torch.nn.Module:
        if isinstance(module, MPConv):
            return PlainConv(module.weight)
        assert isinstance(module, Block)
        return PlainBlock(module)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_logvar: bool = False,
    ):
        net, unet = self.original[0], self.original[0].unet
        sigma = sigma.reshape(-1, 1, 1, 1)
        c_skip = net.sigma_data**2 / (sigma**2 + net.sigma_data**2)
        c_out = sigma * net.sigma_data / (sigma**2 + net.sigma_data**2).sqrt()
        c_in = 1 / (net.sigma_data**2 + sigma**2).sqrt()
        c_noise = sigma.flatten().log() / 4

        emb = self.emb_noise(unet.emb_fourier(c_noise))
        if self.emb_label is not None and class_labels is not None:
            emb = mp_sum(emb, self.emb_label(class_labels * np.sqrt(class_labels.shape[1])), t=unet.label_balance)
        emb = mp_silu(emb)
        y = torch.cat([c_in * x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for module in self.enc.values():
            y = module(y) if isinstance(module, PlainConv) else module(y, emb)
            skips.append(y)
        for name, module in self.dec.items():
            if "block" in name:
                y = mp_cat(y, skips.pop(), t=unet.concat_balance)
            y = module(y, emb)
        D_x = c_skip * x + c_out * self.out_conv(y, gain=self.out_gain)
        if return_logvar:
            return D_x, self.logvar_linear(net.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
        return D_x


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
        self.L, self.Q = torch.linalg.eigh(distribution.Sigma)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = self.L + sigma[:, None, None] ** 2  # [N, K, 2], along the eigenvectors
        z = torch.einsum("kji,nkj->nki", self.Q, self.mu - x[:, None])
        density = self.phi * (-(z**2 / variance).sum(2) / 2).exp() / (2 * math.pi * variance.prod(2).sqrt())
        gradient = torch.einsum("nk,kij,nkj->ni", density, self.Q, z / variance)
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


def frechet_by_matrix_root(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root))
