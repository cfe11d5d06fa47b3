"""The entries, and what is found by a network or a configuration of them."""

from dataclasses import replace
from typing import Any

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.config.consistency import ConsistencyTraining
from training.config.training import Preset, TrainConfig
from training.denoiser import Denoiser
from training.families import classifier, edm2, nvae, score_sde, toy, uvit
from training.families.architecture import Architecture
from training.families.parts import edm2_optimizer, power_function_ema
from training.losses_consistency import consistency_objective

ARCHITECTURES: dict[str, Architecture] = {
    "edm2.Precond": edm2.ENTRY,
    "score_sde.ScoreSDE": score_sde.ENTRY,
    "uvit.UViTDenoiser": uvit.ENTRY,
    "nvae.NVAE": nvae.ENTRY,
    "classifier.NoisyClassifier": classifier.ENTRY,
    "toy.ToyModel": toy.ENTRY,
}


def spec_of_preset(preset: Preset, cond: bool = True) -> DataSpec:
    """What the data look like that a preset is meant for, with or without conditions."""
    text = preset.context[0] > 0
    conditioning = Conditioning.of_text(*preset.context) if text else Conditioning.of_labels(cond * preset.classes)
    return DataSpec(channels=preset.channels, resolution=preset.resolution, conditioning=conditioning)


def preset_network(preset: Preset) -> Any:
    """A freshly initialised network of a training preset, for the data that the preset is meant for."""
    return trained_by(preset.config).build(preset.config.network, spec_of_preset(preset))


def trained_by(config: TrainConfig) -> Architecture:
    """The registry's entry for what a training configuration trains; of one that tunes, with what tunes it."""
    if not isinstance(config, ConsistencyTraining):
        return next(entry for entry in ARCHITECTURES.values() if entry.training is type(config))
    tuned = next(entry for entry in ARCHITECTURES.values() if entry.network is type(config.network))
    return replace(
        tuned,
        training=ConsistencyTraining,
        objective=consistency_objective,
        optimizer=edm2_optimizer,
        ema=power_function_ema,
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
