"""Score matching on the toy example's ground truth.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024 (arXiv 2406.02507),
Appendix C.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from dnnlib.errors import one_line
from torch_utils.device import set_up_device
from training.lr import learning_rate_schedule
from training.networks.edm2_layers import normalize_weights_
from training.networks.toy import ToyModel
from training.phema import PowerFunctionEMA
from training.toy.data import GaussianMixture, gt

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ToyConfig:
    """What defines a training run of the toy example.

    Args:
        cls: class to learn: 'A', 'B' or 'AB'.
        num_layers, hidden_dim: of the network.
        P_mean, P_std: of ln(sigma), which is normally distributed.
        sigma_data: standard deviation of the data.
        lr: learning rate until iteration `lr_iter`, from where it falls with the inverse square root.
        ema_std: relative width of the power-function EMA.
    """

    cls: str = "A"
    num_layers: int = 4
    hidden_dim: int = 64
    iterations: int = 4096
    batch: int = 4096
    P_mean: float = -2.3
    P_std: float = 1.5
    sigma_data: float = 0.5
    lr: float = 1e-2
    lr_iter: int = 512
    ema_std: float = 0.010
    seed: int = 0


class ToyProgress(NamedTuple):
    iteration: int  # number of finished iterations
    loss: torch.Tensor  # of the last one
    ema: ToyModel


def score_matching_loss(net: ToyModel, score: Score, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean square of sigma (grad log p_theta(x; sigma) - grad log p(x; sigma)) over x [N, 2] and sigma [N]."""
    difference = net.score(x, sigma, graph=True) - score(x, sigma)
    return (sigma.unsqueeze(1) * difference).square().mean()


class ToyTrainer:
    """Network, optimiser and EMA of a run.

    Args:
        net: the network, on its device.
        compiled: whether to go through `torch.compile`, if that works here.
    """

    def __init__(self, net: ToyModel, distribution: GaussianMixture, config: ToyConfig, compiled: bool = True):
        self.net, self.config, self.iteration = net, config, 0
        self.tracker = PowerFunctionEMA(net, [config.ema_std])
        fused = next(net.parameters()).device.type != "mps"
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=fused)
        in_pieces = functools.partial(score_matching_loss, net, distribution.score)
        self.loss_fn = (compiled_loss(net, distribution, config.batch) if compiled else None) or in_pieces

    def step(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """One iteration on noisy points x [N, 2] with noise levels sigma [N]; returns its loss."""
        normalize_weights_(self.net)
        self.optimizer.zero_grad()
        loss = self.loss_fn(x, sigma)
        loss.backward()
        batch = self.config.batch
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_schedule(
                self.iteration * batch, batch, self.config.lr, self.config.lr_iter, rampup_Mimg=0
            )
        self.optimizer.step()
        self.iteration += 1
        self.tracker.update(self.iteration * batch, batch)
        return loss.detach()

    @property
    def ema(self) -> ToyModel:
        return cast(ToyModel, self.tracker.emas[0])


def compiled_loss(net: ToyModel, distribution: GaussianMixture, batch: int) -> Score | None:
    """`score_matching_loss` as a function of (x, sigma), compiled; None, with a note, where that does not work."""

    def loss(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return score_matching_loss(net, distribution.score_at_once, x, sigma)

    device = distribution.mu.device
    try:
        compiled = torch.compile(loss, dynamic=False)
        compiled(torch.zeros(batch, 2, device=device), torch.ones(batch, device=device)).backward()
    except Exception as err:  # whatever a compiler can fail with; without it, the same computation goes on
        print(f"Note: torch.compile does not work here, training takes longer ({one_line(err)[:100]})")
        return None
    return compiled


def train_toy(config: ToyConfig, device: torch.device, compiled: bool = True) -> Iterator[ToyProgress]:
    """Train a freshly initialised network; yields after every iteration.

    Raises:
        UserError: an unknown class.
    """
    set_up_device(device)
    distribution = gt(config.cls, device)
    torch.manual_seed(config.seed)
    net = ToyModel(2, config.num_layers, config.hidden_dim, config.sigma_data).to(device)
    trainer = ToyTrainer(net, distribution, config, compiled)
    generator = torch.Generator(device).manual_seed(config.seed)
    while trainer.iteration < config.iterations:
        sigma = (torch.randn(config.batch, generator=generator, device=device) * config.P_std + config.P_mean).exp()
        x = distribution.sample(config.batch, sigma, generator)
        loss = trainer.step(x, sigma)
        yield ToyProgress(trainer.iteration, loss, trainer.ema)
