"""NVAE written plainly (arXiv 2007.03898): what its benchmarks compare with.

`plain` takes out of a network what this project computes otherwise: every convolution normalises its weight in every
call, activations have the channels first, and layers are what the paper says they are.
"""

import math
import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from training.config.nvae import NVAEOptimizer
from training.losses_vae import FIRST_ITERATIONS, ITERATIONS, POWER_EPS
from training.networks import nvae, nvae_layers
from training.networks.nvae import NVAE

Vectors = tuple[torch.Tensor, torch.Tensor]


def _weight(conv: nvae_layers.Conv2d) -> torch.Tensor:
    if conv.log_weight_norm is None:
        return conv.weight
    norm = conv.weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    return conv.log_weight_norm.exp() * conv.weight / (norm + nvae_layers.WEIGHT_EPS)


def _conv(conv: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, _weight(conv), conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _bn_swish(norm: Any, x: torch.Tensor) -> torch.Tensor:
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum)
    return x * x.sigmoid()


def _skip_down(skip: Any, x: torch.Tensor) -> torch.Tensor:
    x = x * x.sigmoid()
    convs = (skip.conv_1, skip.conv_2, skip.conv_3, skip.conv_4)
    parts = [
        F.conv2d(x[:, :, i:, j:], _weight(conv), conv.bias, stride=2)
        for conv, (i, j) in zip(convs, skip.OFFSETS, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _skip_up(skip: Any, x: torch.Tensor) -> torch.Tensor:
    upsample, conv = skip
    return conv(upsample(x))


FORWARD = {
    nvae_layers.Conv2d: _conv,
    nvae_layers.BNSwish: _bn_swish,
    nvae_layers.SkipDown: _skip_down,
    nvae_layers.SkipUp: _skip_up,
}


def plain(net: NVAE) -> NVAE:
    """The network, changed in place; with it, what makes its activations have the channels last, in this process."""
    nvae._channels_last = lambda x: x
    for module in net.modules():
        if type(module) in FORWARD:
            module.forward = types.MethodType(FORWARD[type(module)], module)
    for p in net.parameters():
        p.data = p.data.contiguous()
    return net


class Step:
    """Regularisers, gradients and Adamax. Spectral norms of weights of one shape are found together, as published.

    Args:
        net: the network.
        vectors: first u [n, rows] and v [n, columns] of the power method, of each shape of weights.
        options: of Adamax.
        weight: of the regularisers.
    """

    def __init__(self, net: NVAE, vectors: Mapping[tuple[int, int], Vectors], options: NVAEOptimizer, weight: float):
        self.convs: dict[tuple[int, int], list[nvae_layers.Conv2d]] = {}
        for conv in nvae_layers.convolutions(net):
            self.convs.setdefault((conv.weight.shape[0], conv.weight[0].numel()), []).append(conv)
        self.vectors, self.iterations, self.weight = dict(vectors), FIRST_ITERATIONS, weight
        self.norms = nvae_layers.batch_norms(net)
        self.adamax = torch.optim.Adamax(
            net.parameters(),
            lr=0.0,
            betas=(options.betas[0], options.betas[1]),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )

    def regularizer(self) -> torch.Tensor:
        total = torch.stack([norm.weight.abs().max(dim=0).values for norm in self.norms]).sum()
        for shape, convs in self.convs.items():
            w = torch.stack([_weight(conv).flatten(1) for conv in convs])
            u, v = (x.unsqueeze(2) for x in self.vectors[shape])
            with torch.no_grad():
                for _ in range(self.iterations):
                    v = F.normalize(w.transpose(1, 2) @ u, dim=1, eps=POWER_EPS)
                    u = F.normalize(w @ v, dim=1, eps=POWER_EPS)
            self.vectors[shape] = u.squeeze(2), v.squeeze(2)
            total = total + (u.transpose(1, 2) @ w @ v).sum()
        self.iterations = ITERATIONS
        return self.weight * total

    def __call__(self, loss: torch.Tensor, lr: float) -> None:
        self.adamax.zero_grad()
        (loss + self.regularizer()).backward()
        self.adamax.param_groups[0]["lr"] = lr
        self.adamax.step()


def importance_bound(net: NVAE, x: torch.Tensor, noise: list[list[torch.Tensor]]) -> torch.Tensor:
    """Upper bound of -log p(x) [N]; the whole network runs for each of the samples, whose draws `noise` are."""
    weights = []
    for draws in noise:
        out = net(x, draws)
        recon = -net.decoder.log_prob(out.logits, x).sum(dim=(1, 2, 3))
        weights.append(out.log_p - out.log_q - recon)
    return math.log(len(noise)) - torch.stack(weights).logsumexp(dim=0)
