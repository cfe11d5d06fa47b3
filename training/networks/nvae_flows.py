"""Inverse autoregressive flows of NVAE's posteriors (Vahdat & Kautz 2020, section 3.4), which preserve volume."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from training.networks.nvae_layers import Conv2d

HIDDEN = 6  # channels of a flow's hidden layers per latent channel


class MaskedConv2d(Conv2d):
    """Convolution that sees only what comes before each pixel in raster order, or after it if `mirror`.

    Of the pixel itself, it sees the input channels that the argument `centre` [out, in / groups] opens. The weight is
    masked first and then normalised.
    """

    def __init__(self, in_channels: int, kernel: int, centre: torch.Tensor, mirror: bool, groups: int = 1, bias=False):
        super().__init__(in_channels, centre.shape[0], kernel, groups=groups, bias=bias)
        middle = kernel // 2
        mask = torch.zeros(self.weight.shape, device="cpu")
        mask[:, :, :middle, :] = 1
        mask[:, :, middle, :middle] = 1
        mask[:, :, middle, middle] = centre.float()
        # No buffer: published files do not have it, and a network that is built without values needs it all the same.
        self.mask = mask.flip(2, 3) if mirror else mask
        self.reset_norm(self.direction())

    def direction(self) -> torch.Tensor:
        mask = self.mask.to(self.weight.device)
        if not mask.is_meta:
            self.mask = mask
        return self.weight * mask


class FlowStep(nn.Module):
    """z - m(z), where m(z) at a place depends only on the places before it: the log-determinant is 0."""

    def __init__(self, latents: int, mirror: bool):
        super().__init__()
        hidden = HIDDEN * latents
        channel = torch.arange(latents, device="cpu")
        block = channel.repeat_interleave(HIDDEN)  # the latent channel that each hidden one belongs to
        before = block[:, None] > channel
        up_to = channel[:, None] >= block
        first = MaskedConv2d(latents, 3, before, mirror)
        depthwise = MaskedConv2d(hidden, 5, torch.ones(hidden, 1, device="cpu"), mirror, groups=hidden)
        last = MaskedConv2d(hidden, 1, up_to, mirror, bias=True)
        assert last.log_weight_norm is not None
        with torch.no_grad():
            last.log_weight_norm.sub_(math.log(10))
        self.conv = nn.ModuleDict({"convz": nn.Sequential(first, nn.ELU(), depthwise, nn.ELU())})
        self.mu = nn.ModuleDict({"conv_0": last})

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z - self.mu["conv_0"](F.elu(self.conv["convz"](z)))


class FlowCell(nn.Module):
    """Two steps, the second one in the opposite order of pixels: latents [N, Z, H, W] -> the same shape."""

    def __init__(self, latents: int):
        super().__init__()
        self.cell1 = FlowStep(latents, mirror=False)
        self.cell2 = FlowStep(latents, mirror=True)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.cell2(self.cell1(z))
