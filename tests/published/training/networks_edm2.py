"""The network, written plainly. Modules have no constructors: all that they are comes from a pickle."""

import numpy as np
import torch


def normalize(x, dim=None, eps=1e-4):
    dim = list(range(1, x.ndim)) if dim is None else dim
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x / (eps + norm * np.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    return torch.nn.functional.silu(x) / 0.596


def mp_sum(a, b, t):
    return a.lerp(b, t) / np.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    C = np.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (C / np.sqrt(a.shape[1]) * (1 - t)), b * (C / np.sqrt(b.shape[1]) * t)], dim=1)


def resample(x, f, mode):
    if mode == "keep":
        return x
    f = torch.tensor(f, dtype=torch.float32) / sum(f)
    kernel, pad = torch.outer(f, f).tile([x.shape[1], 1, 1, 1]).to(x.dtype), (len(f) - 1) // 2
    if mode == "down":
        return torch.nn.functional.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=pad)
    return torch.nn.functional.conv_transpose2d(x, kernel * 4, groups=x.shape[1], stride=2, padding=pad)


class MPFourier(torch.nn.Module):
    def forward(self, x):
        return np.sqrt(2) * (x.float().outer(self.freqs.float()) + self.phases.float()).cos()


class MPConv(torch.nn.Module):
    def forward(self, x, gain=1):
        w = normalize(self.weight.float()) * (gain / np.sqrt(self.weight[0].numel()))
        assert w.shape[0] == self.out_channels
        w = w.to(x.dtype)
        return x @ w.t() if w.ndim == 2 else torch.nn.functional.conv2d(x, w, padding=w.shape[-1] // 2)


class Block(torch.nn.Module):
    def forward(self, x, emb):
        assert not self.training
        x = resample(x, self.resample_filter, self.resample_mode)
        if self.flavor == "enc":
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None])
        y = torch.nn.functional.dropout(y, p=self.dropout, training=self.training)
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads != 0:
            y = self.attn_qkv(x).reshape(x.shape[0], self.num_heads, -1, 3, x.shape[2] * x.shape[3])
            q, k, v = normalize(y, dim=2).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / np.sqrt(q.shape[2])).softmax(dim=3)
            y = torch.einsum("nhqk,nhck->nhcq", w, v)
            x = mp_sum(x, self.attn_proj(y.reshape(*x.shape)), self.attn_balance)
        assert x.shape[1] == self.out_channels
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class UNet(torch.nn.Module):
    def forward(self, x, noise_labels, class_labels):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            labels = class_labels * np.sqrt(class_labels.shape[1])
            emb = mp_sum(emb, self.emb_label(labels), self.label_balance)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = block(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Precond(torch.nn.Module):
    def forward(self, x, sigma, class_labels=None):
        assert x.shape[1:] == (self.img_channels, self.img_resolution, self.img_resolution)
        assert self.use_fp16 in (True, False)
        sigma, sd = sigma.reshape(-1, 1, 1, 1), self.sigma_data
        c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
        c_in, c_noise = 1 / (sd**2 + sigma**2).sqrt(), sigma.flatten().log() / 4
        if self.label_dim > 0 and class_labels is None:
            class_labels = torch.zeros([1, self.label_dim])
        return c_skip * x + c_out * self.unet(c_in * x, c_noise, class_labels)
