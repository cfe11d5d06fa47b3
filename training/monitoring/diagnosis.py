"""What goes on inside a training run: loss by noise level, norms of gradients and weights, sizes of activations."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torch_utils import distributed
from torch_utils.device import eagerly
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.dataset.order import collate, evenly_spaced
from training.encoders import Encoder
from training.families import trained_by
from training.rounds import Share
from training.samplers.noise import StackedRandomGenerator

LOWEST, HIGHEST = -8.0, 10.0  # ln sigma of the first bin's lower edge, and of the last one's upper edge
PER_UNIT = 2  # bins per unit of ln sigma
BINS = round((HIGHEST - LOWEST) * PER_UNIT)
PROBES = 32  # images that activations are measured on
DIGITS = 6  # of recorded numbers


class LossByNoiseLevel:
    """Sums of the losses of images in bins of ln sigma, kept on the device, without waiting for it.

    Where a network learns the uncertainty u(sigma), a loss L is e / exp(u) + u, with the error e = lambda |D - y|^2
    averaged over the image (EDM2, Eqs. 16 and 21): both are kept as well. The best u is the logarithm of the mean of e.
    """

    def __init__(self, device: torch.device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros([BINS, 4], dtype=wide, device=device)  # number of images, L, e, u

    def add(self, loss: torch.Tensor, of_each_image: dict[str, torch.Tensor]) -> None:
        """Add losses [N]; those that are not finite do not count.

        Args:
            of_each_image: what the objective knows of the images; without `sigma`, nothing happens.
        """
        if "sigma" not in of_each_image:
            return
        sigma, loss = (x.detach().to(self.sums) for x in (of_each_image["sigma"], loss))
        logvar = of_each_image.get("logvar", torch.zeros_like(loss)).to(self.sums)
        values = torch.stack([torch.ones_like(loss), loss, (loss - logvar) * logvar.exp(), logvar], dim=1)
        places = ((sigma.log() - LOWEST) * PER_UNIT).nan_to_num(0).clamp(0, BINS - 1).long()
        finite = values.isfinite().all(dim=1, keepdim=True)
        self.sums.index_add_(0, places, torch.where(finite, values, 0))

    def collect(self) -> dict[str, list[Any]]:
        """Means over all processes since the last call, by the bins that have any; to be called by all processes."""
        sums = distributed.all_reduce_sum_(self.sums.clone()).cpu()
        self.sums.zero_()
        filled = sums[:, 0] > 0
        count, loss, error, logvar = sums[filled].T
        centres = torch.exp(LOWEST + (torch.arange(BINS)[filled] + 0.5) / PER_UNIT)
        found = {"sigma": centres, "count": count, "loss": loss / count}
        if logvar.any():
            found |= {"error": error / count, "logvar": logvar / count}
        rounded = {name: [_rounded(x) for x in values.tolist()] for name, values in found.items()}
        return {**rounded, "count": count.long().tolist()}


def parts_of(net: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name, in its order: the entries of its lists of modules, and what stands beside these.

    A module that holds no list of modules is a part; of others, and of lists, their entries and children are.
    """

    def parts(module: nn.Module, name: str, listed: bool) -> Iterator[tuple[str, nn.Module]]:
        lists = any(isinstance(child, (nn.ModuleList, nn.ModuleDict)) for child in module.children())
        if listed or not (lists or isinstance(module, (nn.ModuleList, nn.ModuleDict))):
            yield name, module
            return
        for child_name, child in module.named_children():
            entry = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            yield from parts(child, f"{name}.{child_name}" if name else child_name, entry)

    found: list[tuple[str, nn.Module]] = []
    for name, child in net.named_children():
        found += parts(child, name, listed=False)
    return {name: module for name, module in found if next(module.parameters(), None) is not None}


def norms_by_part(net: nn.Module, parts: dict[str, nn.Module], gradients: bool) -> dict[str, float]:
    """Euclidean norms of the weights, or of gradients, of each part; those of parameters outside of parts by name."""
    place = {id(p): name for name, module in parts.items() for p in module.parameters()}
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    tensors = [p.grad if gradients else p.detach() for _, p in named]
    norms = torch.stack(torch._foreach_norm([x for x in tensors if x is not None])).double().tolist()
    squares: dict[str, float] = {}
    for (name, p), norm in zip(named, norms, strict=True):
        part = place.get(id(p), name)
        squares[part] = squares.get(part, 0.0) + norm**2
    return {name: math.sqrt(square) for name, square in squares.items()}


class Diagnosis:
    """Records of a run, at their interval, of what EDM2 shows in Figures 3 to 5, and more: mean losses by noise level
    since the record before, norms of the gradients of the step before and of the weights, and root mean squares of the
    activations after each part of the network.

    Activations are those of the network in evaluation mode, outside of training, on always the same images with the
    same noise, as the objective has them. Nothing else of a run depends on any of this.

    Args:
        config: of the run, whose `diagnose` is the interval in images; 0 = nothing happens.
        net, device, share: of the run.
    """

    def __init__(self, config: TrainConfig, net: nn.Module, device: torch.device, share: Share):
        self.config, self.net, self.device, self.batch = config, net, device, share.batch_gpu
        self.interval, self.duration = config.run.diagnose, config.run.duration
        self.losses = LossByNoiseLevel(device)
        self.parts = parts_of(net) if self.interval else {}
        self.gradients: dict[str, float] = {}  # norms
        self.probes: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []

    def prepare(self, dataset: ImageFolderDataset, encoder: Encoder) -> None:
        """Read the images that activations are measured on; on the first process."""
        if self.interval == 0 or distributed.get_rank() != 0:
            return
        objective = trained_by(self.config).objective
        assert objective is not None
        self.objective = objective(self.net, self.config)  # apart from that of the run, which has a state
        chosen = evenly_spaced(len(dataset), PROBES).tolist()
        for first in range(0, len(chosen), self.batch):
            items = chosen[first : first + self.batch]
            images, cond = collate([dataset[i] for i in items])
            rnd = StackedRandomGenerator(self.device, items)
            latents = encoder.encode_latents(images.to(self.device), rnd.randn_like)
            self.probes.append((items, latents, cond.to(self.device)))

    def due(self, nimg: int) -> bool:
        """Whether there is a record after `nimg` images."""
        return self.interval > 0 and (nimg >= self.duration or nimg % self.interval == 0)

    def see_losses(self, loss: torch.Tensor, of_each_image: dict[str, torch.Tensor]) -> None:
        """Take in the losses [N] of a round, and what the objective knows of its images."""
        if self.interval:
            self.losses.add(loss, of_each_image)

    def see_gradients(self) -> None:
        """Take in the gradients of all processes, before they change the weights; of the step before a record."""
        if distributed.get_rank() == 0:
            self.gradients = norms_by_part(self.net, self.parts, gradients=True)

    def record(self, nimg: int) -> dict[str, Any]:
        """A record of a run of `nimg` images; to be called by all processes, of which the first gets it all."""
        losses = self.losses.collect()
        if distributed.get_rank() != 0:
            return {}
        weights = norms_by_part(self.net, self.parts, gradients=False)
        activations = self._activations()
        names = [name for name in self.parts if name in weights]
        parts = {
            name: {
                "gradient_norm": _rounded(self.gradients.get(name, math.nan)),
                "weight_norm": _rounded(weights[name]),
                **({"activation": _rounded(activations[name])} if name in activations else {}),
            }
            for name in [*names, *sorted(weights.keys() - names)]
        }
        return {
            "nimg": nimg,
            "gradient_norm": _rounded(math.hypot(*self.gradients.values())),
            "weight_norm": _rounded(math.hypot(*weights.values())),
            "loss_by_sigma": losses,
            "parts": parts,
        }

    def _activations(self) -> dict[str, float]:
        """Root mean squares of what the parts give, by name."""
        sums = {name: torch.zeros(2, device=self.device) for name in self.parts}

        def watch(name: str):
            def hook(_module: nn.Module, _inputs: tuple, output: Any) -> None:
                for x in output if isinstance(output, (tuple, list)) else [output]:
                    if isinstance(x, torch.Tensor) and x.is_floating_point():
                        square = x.detach().float().square().sum()
                        sums[name] += torch.stack([square, torch.full_like(square, x.numel())])

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in self.parts.items()]
        training = self.net.training
        self.net.eval()
        try:
            gpus = [self.device] if self.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(gpus), eagerly(self.config.run.compile):
                for items, latents, cond in self.probes:
                    rnd = StackedRandomGenerator(self.device, items)
                    self.objective(self.net, latents, cond, rnd=rnd, nimg=0)
        finally:
            self.net.train(training)
            for handle in handles:
                handle.remove()
        found = torch.stack(list(sums.values())).tolist()
        return {name: math.sqrt(square / n) for name, (square, n) in zip(sums, found, strict=True) if n > 0}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs for the same next record; to be called by all processes."""
        return {"sums": distributed.all_reduce_sum_(self.losses.sums.clone())} if self.interval else {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict`, which the first process holds for all."""
        if self.interval and state and distributed.get_rank() == 0:
            self.losses.sums.copy_(state["sums"])


def status_line(record: dict[str, Any]) -> str:
    """What the terminal and the log show of a record."""
    largest = max(record["parts"].items(), key=lambda part: part[1].get("activation") or 0)
    return (
        f"  gradient norm {record['gradient_norm']:.4g}, weight norm {record['weight_norm']:.4g}, "
        f"largest activations {largest[1].get('activation') or math.nan:.4g} after {largest[0]}"
    )


def _rounded(value: float) -> float | None:
    """A number for a file; None = not finite, which JSON does not know."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
