"""Training iterations of the toy example, compiled and not, in the steady state.

As a program, it measures a whole training run, compilation included.
"""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Job
from benchmarks.textbook import PlainMixtureScore
from training.config.toy import ToyConfig
from training.networks.toy import ToyModel
from training.toy.data import gt
from training.toy.training import ToyTrainer, score_matching_loss, train_toy


def iteration(variant: str) -> Callable[[], np.ndarray]:
    """One optimiser step on the same points in every variant; gives the weights after it."""
    config = ToyConfig()
    torch.manual_seed(config.seed)
    net = ToyModel(2, config.num_layers, config.hidden_dim, config.sigma_data)
    distribution = gt(config.cls)
    trainer = ToyTrainer(net, distribution, config, compiled=variant == "compiled")
    if variant == "textbook":
        score = PlainMixtureScore(distribution)
        trainer.loss_fn = lambda x, sigma: score_matching_loss(net, score, x, sigma)
    torch.manual_seed(1)
    sigma = (torch.randn(config.batch) * config.P_std + config.P_mean).exp()
    x = distribution.sample(config.batch, sigma)

    def run() -> np.ndarray:
        trainer.step(x, sigma)
        return torch.cat([p.detach().flatten() for p in net.parameters()]).numpy()

    return run


JOBS = [
    Job(
        f"toy training, {variant}",
        functools.partial(iteration, "textbook"),
        functools.partial(iteration, variant),
        bar,
        tolerance=1e-4,
    )
    for variant, bar in [("compiled", 12), ("eager", 5)]
]


def main() -> None:
    start = time.perf_counter()
    progress = list(train_toy(ToyConfig(), torch.device("cpu")))[-1]
    seconds = time.perf_counter() - start
    print(f"{progress.iteration} iterations: {seconds:.1f} s, loss {progress.loss:.4f}")


if __name__ == "__main__":
    main()
