"""Score matching on the toy example's ground truth.

Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024 (arXiv 2406.02507),
Appendix C.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, cast

import torch

from dnnlib.errors import one_line
from dnnlib.progress import Progress
from torch_utils.device import set_up_device
from training.config.toy import ToyConfig
from training.lr import learning_rate_schedule
from training.networks.edm2_layers import normalize_weights_
from training.networks.toy import ToyModel
from training.phema import PowerFunctionEMA
from training.toy.data import GaussianMixture, gt

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


FIRST_SNAPSHOT = 256  # iterations; further snapshots are at every doubling, and at the end
FRAME_INTERVAL = 64  # iterations


class ToyProgress(NamedTuple):
    """State of a run after an iteration."""

    iteration: int  # number of finished iterations
    loss: torch.Tensor  # of the last one
    ema: ToyModel


def score_matching_loss(net: ToyModel, score: Score, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean square of sigma (grad log p_theta(x; sigma) - grad log p(x; sigma)) over x [N, 2], with sigma [N]."""
    difference = net.score(x, sigma, graph=True) - score(x, sigma)
    return (sigma.unsqueeze(1) * difference).square().mean()


class ToyTrainer:
    """Network, optimiser and EMA of a run.

    Args:
        net: the network, on its device.
        distribution: what it learns, on the same device.
        config: of the run.
        compiled: use `torch.compile`, if it works here.
    """

    def __init__(self, net: ToyModel, distribution: GaussianMixture, config: ToyConfig, compiled: bool = True):
        self.net, self.config, self.iteration = net, config, 0
        self.tracker = PowerFunctionEMA(net, [config.ema_std])
        fused = next(net.parameters()).device.type != "mps"
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=fused)
        in_pieces = functools.partial(score_matching_loss, net, distribution.score)
        self.loss_fn = (compiled_loss(net, distribution, config.batch) if compiled else None) or in_pieces

    def step(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The loss of one iteration on noisy points x [N, 2] with noise levels sigma [N]."""
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
        """The averaged network, which further iterations change."""
        return cast(ToyModel, self.tracker.emas[0])


def compiled_loss(net: ToyModel, distribution: GaussianMixture, batch: int) -> Score | None:
    """`score_matching_loss` as a compiled function of (x, sigma); None, with a note, if that does not work here."""

    def loss(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return score_matching_loss(net, distribution.score_at_once, x, sigma)

    device = distribution.mu.device
    try:
        compiled = torch.compile(loss, dynamic=False)
        compiled(torch.zeros(batch, 2, device=device), torch.ones(batch, device=device)).backward()
    except Exception as err:  # compilers fail in all kinds of ways; the computation works without them
        print(f"Note: torch.compile does not work here, training takes longer ({one_line(err)[:100]})")
        return None
    return compiled


def train_toy(config: ToyConfig, device: torch.device, compiled: bool = True) -> Iterator[ToyProgress]:
    """Progress of the training of a new network, after every iteration.

    Args:
        config: of the run.
        device: where to train.
        compiled: as for `ToyTrainer`.

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


class View(Protocol):
    """Where the samples of a run are shown: a `training.toy.figure.TrainingView`."""

    @property
    def wanted(self) -> bool: ...

    def draw(self, iteration: int, loss: float, net: ToyModel) -> None: ...

    def finish(self) -> None: ...


def run_training(
    config: ToyConfig,
    device: torch.device,
    view: View | None = None,
    save: Callable[[int, ToyModel], str] | None = None,
) -> None:
    """Train a new network with a progress bar, a view of its samples, and snapshots.

    Args:
        config: of the run.
        device: where to train.
        view: shown every `FRAME_INTERVAL` iterations; None = no view.
        save: saves the EMA after the iterations given, and returns the path; None = no snapshots.

    Raises:
        UserError: an unknown class.
    """
    saved_at = {config.iterations} | {FIRST_SNAPSHOT << i for i in range(config.iterations.bit_length())}
    with Progress(total=config.iterations, unit="it") as progress:
        for iteration, loss, ema in train_toy(config, device):
            if iteration % FRAME_INTERVAL == 0 or iteration == config.iterations:
                progress.bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                if view is not None and view.wanted:
                    view.draw(iteration, loss.item(), ema)
            progress.update()
            if save is not None and iteration in saved_at:
                progress.write(save(iteration, ema))
    if view is not None:
        view.finish()
