"""Training iterations of the toy example: ours, compiled and not, against the straightforward einsum version.

The textbook variant evaluates the mixture's score as one would write it down: noisy covariances through their
eigenvectors, densities and their weighted sum with einsum. All variants start from the same weights, see the same
points, and take turns. `--full` measures a whole training run instead, compilation included.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.networks_toy import ToyModel
from training.toy_data import GaussianMixture, gt
from training.toy_training import ToyConfig, ToyTrainer, score_matching_loss, train_toy


class TextbookScore:
    def __init__(self, distribution: GaussianMixture):
        self.phi, self.mu = distribution.phi, distribution.mu
        self.variances, self.axes = torch.linalg.eigh(distribution.Sigma)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        variance = self.variances + sigma[:, None, None] ** 2  # [N, K, 2], along the eigenvectors
        z = torch.einsum("kji,nkj->nki", self.axes, self.mu - x[:, None])
        density = self.phi * (-(z**2 / variance).sum(2) / 2).exp() / (2 * math.pi * variance.prod(2).sqrt())
        gradient = torch.einsum("nk,kij,nkj->ni", density, self.axes, z / variance)
        return gradient / density.sum(1, keepdim=True)


class TextbookTrainer(ToyTrainer):
    def __init__(self, net: ToyModel, distribution: GaussianMixture, config: ToyConfig):
        super().__init__(net, distribution, config, compiled=False)
        score = TextbookScore(distribution)
        self.loss_fn = lambda x, sigma: score_matching_loss(net, score, x, sigma)


def fresh_net(config: ToyConfig) -> ToyModel:
    torch.manual_seed(config.seed)
    return ToyModel(2, config.num_layers, config.hidden_dim, config.sigma_data)


@click.command()
@click.option("--rounds", help="Times that each variant has its turn", type=click.IntRange(min=1), default=20)
@click.option("--full", help="Measure a whole training run", is_flag=True)
def main(rounds: int, full: bool) -> None:
    config = ToyConfig()
    if full:
        start = time.perf_counter()
        progress = list(train_toy(config, torch.device("cpu")))[-1]
        seconds = time.perf_counter() - start
        print(f"{progress.iteration} iterations of {config.batch} points: {seconds:.1f} s, loss {progress.loss:.4f}")
        return
    distribution = gt(config.cls)
    start = time.perf_counter()
    trainers = {"compiled": ToyTrainer(fresh_net(config), distribution, config)}
    compile_seconds = time.perf_counter() - start
    trainers["eager"] = ToyTrainer(fresh_net(config), distribution, config, compiled=False)
    trainers["textbook"] = TextbookTrainer(fresh_net(config), distribution, config)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        sigma = (torch.randn(config.batch) * config.P_std + config.P_mean).exp()
        x = distribution.sample(config.batch, sigma)
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(x, sigma)
            times[name].append(time.perf_counter() - start)
    weights = {name: torch.cat([p.flatten() for p in trainer.net.parameters()]) for name, trainer in trainers.items()}
    print(f"Iterations on {torch.get_num_threads()} threads, median of {rounds} (fastest-slowest); ", end="")
    print(f"compilation took {compile_seconds:.1f} s")
    for name, seconds in times.items():
        ratio = statistics.median(times["textbook"]) / statistics.median(seconds)
        difference = (weights[name] - weights["textbook"]).norm() / weights["textbook"].norm()
        milliseconds = [f(seconds) * 1e3 for f in (statistics.median, min, max)]
        print(
            f"  {name:10s}{{:8.1f}} ms ({{:.1f}}-{{:.1f}})".format(*milliseconds)
            + f"   ratio {ratio:5.1f}   weights differ by {difference:.0e}"
        )


if __name__ == "__main__":
    main()
