"""The energy model of the toy example: a magnitude-preserving MLP that gives log p(x; sigma) in two dimensions.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024 (arXiv 2406.02507),
Appendix C.
"""

import torch
from torch import nn

from training.config.toy import ToyNetwork
from training.networks.edm2_layers import MPConv, mp_silu


class MPSiLU(nn.Module):
    """`mp_silu` as a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mp_silu(x)


class ToyModel(nn.Module):
    """Unnormalised log-density of noisy data, and its gradient, the score.

    Args:
        in_dim: dimensions of the data.
        num_layers: hidden layers.
        hidden_dim: their width.
        sigma_data: standard deviation of the data.
    """

    def __init__(
        self,
        in_dim: int = ToyNetwork.in_dim,
        num_layers: int = ToyNetwork.num_layers,
        hidden_dim: int = ToyNetwork.hidden_dim,
        sigma_data: float = ToyNetwork.sigma_data,
    ):
        super().__init__()
        self.init_kwargs = dict(in_dim=in_dim, num_layers=num_layers, hidden_dim=hidden_dim, sigma_data=sigma_data)
        self.sigma_data = sigma_data
        self.gain = nn.Parameter(torch.zeros([]))
        layers: list[nn.Module] = [MPConv(in_dim + 2, hidden_dim)]
        for _ in range(num_layers):
            layers += [MPSiLU(), MPConv(hidden_dim, hidden_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """log p(x; sigma) up to a constant: x [..., in_dim], sigma a number or [...] -> [...]."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        x_in = x * c_in[..., None]
        c_noise, bias = sigma.log() / 4, torch.ones_like(sigma)
        y = self.layers(torch.cat([x_in, torch.stack([c_noise, bias], dim=-1)], dim=-1))
        # A Gaussian of the data's variance, and what the network makes of it.
        return self.gain * y.square().mean(dim=-1) / sigma - x_in.square().sum(dim=-1) / 2

    def logp(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        return self(x, sigma)

    def score(self, x: torch.Tensor, sigma: torch.Tensor | float, graph: bool = False) -> torch.Tensor:
        """Gradient of `logp` with respect to x, shaped like `x`; with `graph`, to be differentiated itself."""
        score = torch.func.grad(lambda x: self(x, sigma).sum())(x)
        return score if graph else score.detach()
