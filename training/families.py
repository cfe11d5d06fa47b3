"""The registry: one entry per architecture, with all that the rest of the code needs to know about it.

A new family is an entry here, `networks/x.py`, `config/x.py` and `train_x.py`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.config.classifier import CLASSIFIER_PRESETS, ClassifierNetwork, ClassifierTraining
from training.config.consistency import ConsistencyTraining
from training.config.edm2 import TRAINING_PRESETS, EDM2Network, EDM2Training
from training.config.fields import Config
from training.config.generation import SamplingConfig
from training.config.likelihood import LikelihoodConfig
from training.config.nvae import TRAINING_PRESETS as NVAE_PRESETS
from training.config.nvae import NVAENetwork, NVAETraining
from training.config.score_sde import ScoreNetwork, ScoreTraining
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.toy import ToyNetwork
from training.config.training import Preset, TrainConfig
from training.config.uvit import UViTNetwork, UViTTraining
from training.config.uvit_presets import UVIT_PRESETS
from training.denoiser import Denoiser
from training.flops import Inputs
from training.generators import Generator, VAEGenerator, diffusion_generator, vae_pictures
from training.likelihood import FlowLikelihood, Likelihood
from training.likelihood_vae import VAELikelihood
from training.losses import ClassifierLoss, EDM2Loss, NoiseLoss, Objective, ScoreLoss, WithoutSomeConditions
from training.losses_consistency import consistency_objective
from training.losses_vae import PixelObjective
from training.lr import learning_rate_schedule, warmup_cosine, warmup_linear
from training.networks import edm2_cpu, nvae_layers, uvit_cpu
from training.networks.classifier import NoisyClassifier
from training.networks.edm2 import Precond
from training.networks.edm2_layers import effective_weights
from training.networks.nvae import NVAE
from training.networks.score_sde import ScoreSDE, schedule_for
from training.networks.toy import ToyModel
from training.networks.uvit_denoiser import UViTDenoiser, uvit_schedule
from training.optimizers import EMA, AdamaxOptimizer, AdamOptimizer, Optimizer
from training.phema import LatestWeights, PowerFunctionEMA, ProfilesAndRampedEMA


def no_context(_net: nn.Module) -> AbstractContextManager:
    """A context in which nothing is different."""
    return nullcontext()


def plain(net: Any, _batch_size: int, _compiled: bool) -> Denoiser:
    """A network as it is, for sampling."""
    return net


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


def _from_data(network_class: Callable[..., nn.Module]) -> Callable[[dict[str, Any], Any], nn.Module]:
    """`make` of networks that take the data first."""
    return lambda arguments, data: network_class(data, **arguments)


def _edm2_optimizer(net: nn.Module, config: EDM2Training | ConsistencyTraining) -> AdamOptimizer:
    chosen = config.optimizer

    def learning_rate(nimg: int) -> float:
        return learning_rate_schedule(nimg, config.run.batch, chosen.lr, chosen.decay, chosen.rampup_Mimg)

    betas = (chosen.betas[0], chosen.betas[1])
    return AdamOptimizer(net, learning_rate, betas=betas, eps=chosen.eps, loss_scaling=config.run.ls)


def _power_function_ema(net: nn.Module, config: TrainConfig) -> PowerFunctionEMA:
    return PowerFunctionEMA(net, config.ema.ema_std)


def _edm2_objective(_net: nn.Module, config: EDM2Training) -> EDM2Loss:
    return EDM2Loss(config.objective.P_mean, config.objective.P_std, config.network.sigma_data)


def _edm2_network(arguments: dict[str, Any], data: DataSpec) -> Precond:
    return Precond(data.resolution, data.channels, data.conditioning.size, precision="fp32", **arguments)


def _take_edm2_data(kwargs: dict[str, Any]) -> DataSpec:
    conditioning = Conditioning.of_labels(kwargs.pop("label_dim"))
    return DataSpec(
        channels=kwargs.pop("img_channels"), resolution=kwargs.pop("img_resolution"), conditioning=conditioning
    )


def _score_objective(_net: nn.Module, config: ScoreTraining) -> ScoreLoss:
    chosen, network = config.objective, config.network
    return ScoreLoss(
        schedule_for(network),
        chosen.reduce_mean,
        chosen.likelihood_weighting,
        chosen.importance_sampling,
        network.pixel_range if chosen.dequantize else None,
    )


def _score_optimizer(net: nn.Module, config: ScoreTraining | ClassifierTraining) -> AdamOptimizer:
    chosen = config.optimizer
    return AdamOptimizer(
        net,
        lambda nimg: warmup_linear(nimg, chosen.lr, chosen.warmup, chosen.decay_from, chosen.decay_to),
        betas=(chosen.beta1, 0.999),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        max_norm=chosen.grad_clip,
        loss_scaling=config.run.ls,
    )


def _profiles_and_ema(
    net: nn.Module, config: ScoreTraining | UViTTraining | ClassifierTraining, *, ramp_up: bool
) -> EMA:
    if config.ema.ema_rate == 0:
        return PowerFunctionEMA(net, config.ema.ema_std)
    return ProfilesAndRampedEMA(net, config.ema.ema_std, config.ema.ema_rate, ramp_up)


def _uvit_objective(_net: nn.Module, config: UViTTraining) -> WithoutSomeConditions:
    chosen, prediction = config.objective, config.network.prediction
    loss = NoiseLoss(
        uvit_schedule(config.network),
        "data" if prediction == "data" else "noise",
        (chosen.P_mean, chosen.P_std) if chosen.noise_levels == "lognormal" else None,
    )
    return WithoutSomeConditions(loss, chosen.cond_dropout)


def _uvit_optimizer(net: nn.Module, config: UViTTraining) -> AdamOptimizer:
    chosen = config.optimizer

    def learning_rate(nimg: int) -> float:
        if chosen.decay_to == 0:
            return warmup_linear(nimg, chosen.lr, chosen.warmup)
        return warmup_cosine(nimg, chosen.decay_to, chosen.lr, warmup_nimg=chosen.warmup)

    return AdamOptimizer(
        net,
        learning_rate,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        decoupled=True,
        undecayed=("net.pos_embed", "net.label_emb.weight") if chosen.decay_exclude_embeddings else (),
        max_norm=chosen.grad_clip,
        loss_scaling=config.run.ls,
    )


def _classifier_objective(_net: nn.Module, _config: ClassifierTraining) -> ClassifierLoss:
    return ClassifierLoss()


def _classifier_inputs(net: Any, batch: int, device: torch.device | str) -> Inputs:
    return torch.zeros([batch, *net.spec.shape], device=device), torch.ones(batch, device=device)


def _toy_network(arguments: dict[str, Any], _data: None) -> ToyModel:
    return ToyModel(**arguments)


def _toy_inputs(net: Any, batch: int, device: torch.device | str) -> Inputs:
    return torch.zeros([batch, net.init_kwargs["in_dim"]], device=device), torch.ones(batch, device=device)


def _nvae_network(arguments: dict[str, Any], data: DataSpec) -> NVAE:
    return NVAE(data.resolution + 2 * arguments.get("loss_crop", 0), data.channels, **arguments)


def _nvae_inputs(net: Any, batch: int, device: torch.device | str) -> Inputs:
    return (torch.zeros([batch, net.img_channels, net.img_resolution, net.img_resolution], device=device),)


def _nvae_objective(net: Any, config: NVAETraining) -> PixelObjective:
    schedules = config.objective.to_json()
    return PixelObjective(net, config.run.duration, **schedules, seed=config.run.seed).to(net.prior_ftr0.device)


def _nvae_ema(net: nn.Module, config: NVAETraining) -> EMA:
    return PowerFunctionEMA(net, config.ema.ema_std) if config.ema.ema_std else LatestWeights(net)


def _nvae_likelihood(net: Any, config: LikelihoodConfig) -> VAELikelihood:
    return VAELikelihood(net, config.vae.samples, config.vae.max_batch)


def _flow_likelihood(net: Any, config: LikelihoodConfig) -> FlowLikelihood:
    return FlowLikelihood(net, config.flow)


def _edm2_likelihood(net: Any, config: LikelihoodConfig) -> FlowLikelihood:
    return FlowLikelihood(net, config.flow, effective_weights)


ARCHITECTURES: dict[str, Architecture] = {
    "edm2.Precond": Architecture(
        family="EDM2",
        paper="Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models* (CVPR 2024, "
        "[arXiv 2312.02696](https://arxiv.org/abs/2312.02696))",
        network_class=Precond,
        network=EDM2Network,
        make=_edm2_network,
        training=EDM2Training,
        presets=TRAINING_PRESETS,
        objective=_edm2_objective,
        optimizer=_edm2_optimizer,
        ema=_power_function_ema,
        core=lambda net: net.unet,
        step=partial(effective_weights, normalize_first=True),
        accelerate=edm2_cpu.for_sampling,
        likelihood=_edm2_likelihood,
        take_data=_take_edm2_data,
    ),
    "score_sde.ScoreSDE": Architecture(
        family="score-SDE",
        paper="Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations* (ICLR 2021, "
        "[arXiv 2011.13456](https://arxiv.org/abs/2011.13456))",
        network_class=ScoreSDE,
        network=ScoreNetwork,
        make=_from_data(ScoreSDE),
        training=ScoreTraining,
        presets=SCORE_PRESETS,
        objective=_score_objective,
        optimizer=_score_optimizer,
        ema=partial(_profiles_and_ema, ramp_up=True),
        core=lambda net: net.net,
        likelihood=_flow_likelihood,
    ),
    "uvit.UViTDenoiser": Architecture(
        family="U-ViT",
        paper="Bao et al., *All are Worth Words: A ViT Backbone for Diffusion Models* (CVPR 2023, "
        "[arXiv 2209.12152](https://arxiv.org/abs/2209.12152))",
        network_class=UViTDenoiser,
        network=UViTNetwork,
        make=_from_data(UViTDenoiser),
        training=UViTTraining,
        presets=UVIT_PRESETS,
        objective=_uvit_objective,
        optimizer=_uvit_optimizer,
        ema=partial(_profiles_and_ema, ramp_up=False),
        core=lambda net: net.net,
        accelerate=uvit_cpu.for_sampling,
        likelihood=_flow_likelihood,
    ),
    "nvae.NVAE": Architecture(
        family="NVAE",
        paper="Vahdat & Kautz, *NVAE: A Deep Hierarchical Variational Autoencoder* (NeurIPS 2020, "
        "[arXiv 2007.03898](https://arxiv.org/abs/2007.03898))",
        network_class=NVAE,
        network=NVAENetwork,
        make=_nvae_network,
        inputs=_nvae_inputs,
        training=NVAETraining,
        presets=NVAE_PRESETS,
        objective=_nvae_objective,
        optimizer=AdamaxOptimizer,
        ema=_nvae_ema,
        step=nvae_layers.effective_weights,
        generate=VAEGenerator,
        pictures=vae_pictures,
        likelihood=_nvae_likelihood,
    ),
    "classifier.NoisyClassifier": Architecture(
        family="classifier",
        paper="Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations* (ICLR 2021, "
        "[arXiv 2011.13456](https://arxiv.org/abs/2011.13456))",
        network_class=NoisyClassifier,
        network=ClassifierNetwork,
        make=_from_data(NoisyClassifier),
        inputs=_classifier_inputs,
        training=ClassifierTraining,
        presets=CLASSIFIER_PRESETS,
        objective=_classifier_objective,
        optimizer=_score_optimizer,
        ema=partial(_profiles_and_ema, ramp_up=True),
        makes_images=False,
    ),
    "toy.ToyModel": Architecture(
        family="toy example",
        paper="Karras et al., *Guiding a Diffusion Model with a Bad Version of Itself* (NeurIPS 2024, "
        "[arXiv 2406.02507](https://arxiv.org/abs/2406.02507))",
        network_class=ToyModel,
        network=ToyNetwork,
        make=_toy_network,
        inputs=_toy_inputs,
        makes_images=False,
    ),
}


def preset_network(preset: Preset) -> Any:
    """A freshly initialised network of a training preset, for the data that the preset is meant for."""
    text = preset.context[0] > 0
    conditioning = Conditioning.of_text(*preset.context) if text else Conditioning.of_labels(preset.classes)
    data = DataSpec(channels=preset.channels, resolution=preset.resolution, conditioning=conditioning)
    return trained_by(preset.config).build(preset.config.network, data)


def trained_by(config: TrainConfig) -> Architecture:
    """The registry's entry for what a training configuration trains; of one that tunes, with what tunes it."""
    if not isinstance(config, ConsistencyTraining):
        return next(entry for entry in ARCHITECTURES.values() if entry.training is type(config))
    tuned = next(entry for entry in ARCHITECTURES.values() if entry.network is type(config.network))
    return replace(
        tuned,
        training=ConsistencyTraining,
        objective=consistency_objective,
        optimizer=_edm2_optimizer,
        ema=_power_function_ema,
    )


def architecture_name(net: Any) -> str:
    """The registry's name for a network.

    Raises:
        UserError: it is none of the registry's.
    """
    for name, architecture in ARCHITECTURES.items():
        if type(net) is architecture.network_class:
            return name
    raise UserError(f"a {type(net).__name__} is no network of this project (known: {', '.join(ARCHITECTURES)})")


def architecture_of(net: Any) -> Architecture:
    """The registry's entry for a network.

    Raises:
        UserError: it is none of the registry's.
    """
    return ARCHITECTURES[architecture_name(net)]


def is_other_than_denoiser(net: Any) -> bool:
    """Whether something is a network of this project that makes images in another way than by denoising."""
    return any(type(net) is entry.network_class and not entry.is_denoiser for entry in ARCHITECTURES.values())


def accelerated(denoiser: Any, batch_size: int, compiled: bool = False) -> Denoiser:
    """The fastest form of a denoiser for sampling; of a callable that is no network of this project, it itself."""
    for architecture in ARCHITECTURES.values():
        if type(denoiser) is architecture.network_class:
            return architecture.accelerate(denoiser, batch_size, compiled)
    return denoiser
