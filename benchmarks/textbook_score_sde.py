"""Score-SDE models written plainly (arXiv 2011.13456): what their benchmarks compare with. The network's state dict is
that of `training.networks.ncsnpp.NCSNpp`."""

import math
from collections.abc import Callable

import numpy as np
import scipy.integrate
import torch
import torch.nn.functional as F
from torch import nn

from training.config.score_sde import ScoreOptimizer

TAPS = (1.0, 3.0, 3.0, 1.0)


def resample(x: torch.Tensor, taps: tuple[float, ...], up: int, down: int, pad: tuple[int, int]) -> torch.Tensor:
    """Zeros between pixels, padding, a convolution of each channel with the filter, and every `down`-th pixel."""
    N, C, H, W = x.shape
    k = torch.tensor(taps)
    k = torch.outer(k, k)
    k = k / k.sum() * up**2
    x = x.reshape(N * C, 1, H, 1, W, 1)
    x = F.pad(x, [0, up - 1, 0, 0, 0, up - 1]).reshape(N * C, 1, H * up, W * up)
    x = F.pad(x, [pad[0], pad[1], pad[0], pad[1]])
    x = F.conv2d(x, k.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return x.reshape(N, C, *x.shape[2:])


# ---------------------------------------------------------------------------------------------------------
# NCSN++ and DDPM++


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels: int):
        super().__init__(min(channels // 4, 32), channels, eps=1e-6)


class NIN(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.zeros(channels, channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.W) + self.b[None, :, None, None]


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.GroupNorm_0 = GroupNorm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, C, H, W = x.shape
        h = self.GroupNorm_0(x)
        q, k, v = self.NIN_0(h), self.NIN_1(h), self.NIN_2(h)
        w = torch.einsum("nchw,ncij->nhwij", q, k) * C**-0.5
        w = w.reshape(N, H, W, H * W).softmax(dim=-1).reshape(N, H, W, H, W)
        h = self.NIN_3(torch.einsum("nhwij,ncij->nchw", w, v))
        return (x + h) / math.sqrt(2)


class Block(nn.Module):
    def __init__(self, channels: int, out: int, emb: int, mode: str = "keep", fir: bool = False):
        super().__init__()
        self.mode, self.fir = mode, fir
        self.GroupNorm_0, self.GroupNorm_1 = GroupNorm(channels), GroupNorm(out)
        self.Conv_0, self.Conv_1 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.Dense_0 = nn.Linear(emb, out)
        self.Conv_2 = nn.Conv2d(channels, out, 1) if channels != out or mode != "keep" else None

    def resample(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "up":
            return resample(x, TAPS, 2, 1, (2, 1)) if self.fir else F.interpolate(x, scale_factor=2)
        if self.mode == "down":
            return resample(x, TAPS, 1, 2, (1, 1)) if self.fir else F.avg_pool2d(x, 2)
        return x

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.resample(F.silu(self.GroupNorm_0(x)))
        x = self.resample(x)
        h = self.Conv_0(h) + self.Dense_0(F.silu(emb))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        return ((x if self.Conv_2 is None else self.Conv_2(x)) + h) / math.sqrt(2)


class FilteredConv(nn.Module):
    """Half the resolution."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.Conv2d_0 = nn.Conv2d(channels, out, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.Conv2d_0(resample(x, TAPS, 1, 1, (2, 2)))


class Fourier(nn.Module):
    def __init__(self, nf: int):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(nf), requires_grad=False)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        angles = sigma.log()[:, None] * self.W[None, :] * 2 * np.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class NCSNpp(nn.Module):
    """NCSN++ of VE, with Fourier features, filters and a residual pyramid of inputs; or DDPM++ of VP without these.
    Dropout is left out."""

    def __init__(
        self,
        resolution: int,
        channels: int,
        nf: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        attn_resolutions: tuple[int, ...],
        ve: bool,
    ):
        super().__init__()
        self.ve, self.nf, emb, last = ve, nf, 4 * nf, len(ch_mult) - 1
        modules: list[nn.Module] = [Fourier(nf)] if ve else []
        modules += [nn.Linear(nf * 2 if ve else nf, emb), nn.Linear(emb, emb), nn.Conv2d(channels, nf, 3, padding=1)]
        skips, width, pyramid = [nf], nf, channels
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                modules.append(Block(width, nf * mult, emb))
                width = nf * mult
                if resolution >> level in attn_resolutions:
                    modules.append(Attention(width))
                skips.append(width)
            if level < last:
                modules.append(Block(width, width, emb, "down", ve))
                if ve:
                    modules.append(FilteredConv(pyramid, width))
                    pyramid = width
                skips.append(width)
        modules += [Block(width, width, emb), Attention(width), Block(width, width, emb)]
        for level, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                modules.append(Block(width + skips.pop(), nf * mult, emb))
                width = nf * mult
            if resolution >> level in attn_resolutions:
                modules.append(Attention(width))
            if level > 0:
                modules.append(Block(width, width, emb, "up", ve))
        modules += [GroupNorm(width), nn.Conv2d(width, channels, 3, padding=1)]
        self.all_modules = nn.ModuleList(modules)
        self.shape = (resolution, len(ch_mult), num_res_blocks, attn_resolutions)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        resolution, levels, num_res_blocks, attn_resolutions = self.shape
        modules = iter(self.all_modules)
        if self.ve:
            emb = next(modules)(label)
            x = 2 * x - 1
        else:
            half = self.nf // 2
            angles = torch.outer(label.float(), 10000 ** (-torch.arange(half) / (half - 1)))
            emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        emb = next(modules)(emb)
        emb = next(modules)(F.silu(emb))
        pyramid, h = x, next(modules)(x)
        hs = [h]
        for level in range(levels):
            attends = resolution >> level in attn_resolutions
            for _ in range(num_res_blocks):
                h = next(modules)(h, emb)
                h = next(modules)(h) if attends else h
                hs.append(h)
            if level < levels - 1:
                h = next(modules)(h, emb)
                if self.ve:
                    h = pyramid = (next(modules)(pyramid) + h) / math.sqrt(2)
                hs.append(h)
        h = next(modules)(h, emb)
        h = next(modules)(h)
        h = next(modules)(h, emb)
        for level in reversed(range(levels)):
            for _ in range(num_res_blocks + 1):
                h = next(modules)(torch.cat([h, hs.pop()], dim=1), emb)
            h = next(modules)(h) if resolution >> level in attn_resolutions else h
            h = next(modules)(h, emb) if level > 0 else h
        h = next(modules)(h)
        h = next(modules)(F.silu(h))
        return h / label[:, None, None, None] if self.ve else h


class Optimization:
    """Adam with warm-up and clipping by the global norm, and an exponential average of the weights, a parameter at a
    time."""

    def __init__(self, net: nn.Module, options: ScoreOptimizer, ema_rate: float):
        self.weights = [p for p in net.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(self.weights, lr=0.0, eps=options.eps, foreach=False)
        self.average = [p.detach().clone() for p in self.weights]
        self.options, self.ema_rate, self.nimg = options, ema_rate, 0

    def step(self, loss: torch.Tensor, batch: int) -> None:
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, self.options.grad_clip, foreach=False)
        self.adam.param_groups[0]["lr"] = self.options.lr * min(self.nimg / self.options.warmup, 1)
        self.adam.step()
        self.nimg += batch
        steps = self.nimg / batch
        decay = min(self.ema_rate, (1 + steps) / (10 + steps))
        with torch.no_grad():
            for average, weight in zip(self.average, self.weights, strict=True):
                average.sub_((1 - decay) * (average - weight))


# ---------------------------------------------------------------------------------------------------------
# Likelihood


def log_likelihood(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    epsilon: torch.Tensor,
    beta: tuple[float, float],
    tolerance: float,
    first_time: float,
) -> torch.Tensor:
    """Density of images by the probability flow of VP: one call of the network for the drift, another for its
    divergence, and a solver in NumPy."""
    shape, dims = images.shape, images[0].numel()

    def drift(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rate = (beta[0] + t * (beta[1] - beta[0])).reshape(-1, 1, 1, 1)
        return -rate * x / 2 - rate * score(x, t) / 2

    def divergence(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            (gradient,) = torch.autograd.grad((drift(x, t) * epsilon).sum(), x)
        return (gradient * epsilon).sum(dim=(1, 2, 3))

    def derivative(t: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[: -len(images)].reshape(shape)).float()
        times = torch.full([len(images)], t)
        with torch.no_grad():
            along = drift(x, times)
        return np.concatenate([along.numpy().reshape(-1), divergence(x, times).numpy().reshape(-1)])

    start = np.concatenate([images.numpy().reshape(-1), np.zeros(len(images))])
    found = scipy.integrate.solve_ivp(derivative, (first_time, 1), start, rtol=tolerance, atol=tolerance, method="RK45")
    end = torch.from_numpy(found.y[:, -1])
    z, delta = end[: -len(images)].reshape(len(images), -1), end[-len(images) :]
    return -(dims * np.log(2 * np.pi) + z.square().sum(dim=1)) / 2 + delta
