"""What the rest of the code knows about an architecture."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from training.conditioning import DataSpec
from training.config.fields import Config
from training.config.generation import SamplingConfig
from training.config.likelihood import LikelihoodConfig
from training.config.training import Preset, TrainConfig
from training.denoiser import Denoiser
from training.flops import Inputs
from training.generators import Generator, diffusion_generator
from training.likelihood import Likelihood
from training.losses import Objective
from training.networks.classifier import NoisyClassifier
from training.optimizers import EMA, Optimizer


def no_context(_net: nn.Module) -> AbstractContextManager:
    """A context in which nothing is different."""
    return nullcontext()


def plain(net: Any, _batch_size: int, _compiled: bool) -> Denoiser:
    """A network as it is, for sampling."""
    return net


def as_they_are(_net: nn.Module) -> dict[str, torch.Tensor | None]:
    """Nothing in place of parameters."""
    return {}


@dataclass(frozen=True)
class Sharing:
    """How the weights of a family's networks are shared out over processes (--shard).

    Args:
        blocks: classes of the modules whose weights are gathered one after the other.
        acting: inside `step`, what acts in place of parameters, by their names; outside, only the names count.
        hold: (net) -> None, tells a network that its parameters are what `acting` says.
    """

    blocks: tuple[type[nn.Module], ...]
    acting: Callable[[nn.Module], dict[str, torch.Tensor | None]] = as_they_are
    hold: Callable[[nn.Module], None] = lambda _net: None

    def blocks_of(self, core: nn.Module) -> list[nn.Module]:
        """The modules of these classes, in the order of the network."""
        return [module for module in core.modules() if isinstance(module, self.blocks)]


def denoiser_inputs(net: Any, batch: int, device: torch.device | str) -> Inputs:
    """Noisy images, noise levels and null conditions of one evaluation of a denoiser."""
    spec: DataSpec = net.spec
    cond = spec.conditioning.null(batch, device)
    inputs = torch.zeros([batch, *spec.shape], device=device), torch.ones(batch, device=device)
    return inputs if cond is None else (*inputs, cond)


@dataclass(frozen=True)
class Architecture:
    """What the rest of the code knows about an architecture.

    Args:
        family: its name in texts.
        paper: where it is described, in Markdown.
        network_class: of its networks, which say in `spec` what their data look like, and in `precision` what they
            compute in. None of these for points of the plane.
        network: its arguments beside the data, and how large they may be in a file.
        make: arguments by name, and data -> a freshly initialised network in float32.
        inputs: (net, batch, device) -> arguments of one evaluation.
        training: configuration of a training run; None = it is not trained by the training loop.
        presets: of training, by name.
        objective, optimizer, ema: (net, configuration) -> what is made small, what changes the weights, and what
            averages them.
        core: the module that --compile and --checkpoint-activations act on.
        step: entered around the forward and backward passes of a training step.
        sharing: how weights are shared out over processes; None = each has all of them.
        accelerate: (net, batch size, compiled) -> the fastest form of a finished network for sampling, which does not
            follow its later changes.
        makes_images: whether it can be asked for images.
        generate: (net, sampling) -> what makes images where the network is no denoiser.
        pictures: (net in eval mode, real latents) -> what else previews show of it, latents by name.
        likelihood: (net, configuration) -> what computes likelihoods; None = nothing here.
        take_data: takes what describes the data out of the arguments in a file; None = they say nothing of it.
    """

    family: str
    paper: str
    network_class: type[nn.Module]
    network: type[Config]
    make: Callable[[dict[str, Any], Any], nn.Module]
    inputs: Callable[[Any, int, torch.device | str], Inputs] = denoiser_inputs
    training: type[TrainConfig] | None = None
    presets: Mapping[str, Preset] = field(default_factory=dict)
    objective: Callable[[nn.Module, Any], Objective] | None = None
    optimizer: Callable[[nn.Module, Any], Optimizer] | None = None
    ema: Callable[[nn.Module, Any], EMA] | None = None
    core: Callable[[Any], nn.Module] = lambda net: net
    step: Callable[[nn.Module], AbstractContextManager] = no_context
    sharing: Sharing | None = None
    accelerate: Callable[[Any, int, bool], Denoiser] = plain
    makes_images: bool = True
    generate: Callable[[Any, SamplingConfig], Generator] | None = None
    pictures: Callable[[Any, torch.Tensor], dict[str, torch.Tensor]] = lambda _net, _latents: {}
    likelihood: Callable[[Any, LikelihoodConfig], Likelihood] | None = None
    take_data: Callable[[dict[str, Any]], DataSpec] | None = None

    @property
    def is_denoiser(self) -> bool:
        """Whether its networks are functions D(x; sigma, cond), which samplers and guidance take."""
        return self.generate is None

    def build(self, network: Config, data: DataSpec) -> Any:
        """A freshly initialised network."""
        return self.make(network.to_json(), data)

    def rebuild(self, kwargs: Mapping[str, Any], data: DataSpec | None) -> Any:
        """A network of the arguments and data that a file names.

        Raises:
            UserError: an argument is unknown, of the wrong type, or larger than a network can be.
            KeyError: one is missing.
        """
        arguments = dict(kwargs)
        if self.take_data is not None:
            data = self.take_data(arguments)
        self.network.from_json(arguments)
        return self.make(arguments, data)

    def generator(
        self,
        net: Any,
        sampling: SamplingConfig,
        batch_size: int | None,
        guide: Denoiser | NoisyClassifier | None = None,
    ) -> Generator:
        """What makes images with a finished network.

        Args:
            batch_size: images at a time, for which the network is accelerated; None = it stays as it is.
            guide: guiding denoiser, in the form that it is to be used in, or classifier.
        """
        if self.generate is not None:
            return self.generate(net, sampling)
        denoiser = net if batch_size is None else self.accelerate(net, batch_size, sampling.compiled)
        return diffusion_generator(denoiser, net.spec, sampling, guide, net.precision)
