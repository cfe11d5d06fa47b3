"""What each family can be trained on, and how its presets are fitted to data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training.config.edm2 import TRAINING_PRESETS as EDM2_PRESETS
from training.config.edm2 import EDM2Training
from training.config.nvae import TRAINING_PRESETS as NVAE_PRESETS
from training.config.nvae import NVAETraining
from training.config.score_sde import ScoreTraining
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.training import Preset, TrainConfig
from training.config.uvit import UViTTraining
from training.config.uvit_presets import UVIT_PRESETS
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many

COARSEST = 8  # resolution of a network's coarsest level, roughly
TOKENS = 16  # of a row of patches
WIDTH = "of the preset: fewer are faster, more can learn more"


@dataclass(frozen=True)
class Data:
    """What a command depends on.

    Args:
        dataset: the images, with their captions where there are any.
        P_mean, P_std: noise levels that suit them.
        because: why these.
        machine: that the network is to be of a size for, a name of MACHINES.
    """

    dataset: ImageFolderDataset
    P_mean: float
    P_std: float
    because: str
    machine: str

    @property
    def latents(self) -> bool:
        return self.dataset.dtype.kind == "f"

    @property
    def resolution(self) -> int:
        return self.dataset.resolution

    def made_for(self, family: "Family") -> str | None:
        """A preset for just such small images; None = there is none."""
        digits = {name: preset for name, preset in family.presets.items() if name.startswith("digits")}
        fitting = (n for n, p in digits.items() if p.fits(self.resolution, self.dataset.num_channels, self.latents))
        return None if self.latents else next(fitting, None)


@dataclass(frozen=True)
class Choice:
    """An option of a command, by the name of its field, and why it has its value."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Args:
        what: it in a few words.
        config: its configuration.
        presets: all of its presets.
        names: data -> the presets to choose from, the one of the nearest resolution being taken.
        choose: data, preset -> options that fit the preset to the data.
    """

    what: str
    config: type[TrainConfig]
    presets: Mapping[str, Preset]
    names: Callable[[Data], list[str]]
    choose: Callable[[Data, Preset], list[Choice]]


def nearest_preset(data: Data, family: Family) -> str:
    """The preset of the nearest resolution, if none is made for just such images."""
    distances = {name: abs(math.log2(family.presets[name].resolution / data.resolution)) for name in family.names(data)}
    return data.made_for(family) or min(distances, key=lambda name: distances[name])


def _levels(data: Data, multiples: tuple[int, ...]) -> tuple[int, ...]:
    """Channel multiples of levels down to about 8x8, as far as the resolution can be halved."""
    halvings = max(round(math.log2(data.resolution / COARSEST)), 1)
    while data.resolution % 2**halvings:
        halvings -= 1
    return (multiples + multiples[-1:] * halvings)[: halvings + 1]


def _unet(data: Data, mult_key: str, multiples: tuple[int, ...], attention: tuple[int, ...]) -> list[Choice]:
    levels = _levels(data, multiples)
    sizes = [data.resolution >> level for level in range(len(levels))]
    choices = []
    if levels != multiples:
        choices.append(Choice(mult_key, levels, f"levels of {', '.join(map(str, sizes))}: down to about {COARSEST}"))
    if not attention:
        return [*choices, Choice("attn_resolutions", (), "none in the preset, but the middle of the network")]
    largest = max(attention) * 1.5  # so that resolutions between powers of two have it as well
    wanted = tuple(size for size in sizes[1:] if size <= largest)
    return [*choices, Choice("attn_resolutions", wanted, "the coarsest levels, where it costs little")]


def _condition(data: Data) -> Choice:
    dataset = data.dataset
    if not dataset.has_labels:
        return Choice("cond", False, "there are no labels")
    vectors = isinstance(dataset.get_stored_label(0), list)
    what = f"vectors of length {dataset.label_dim}" if vectors else many(dataset.label_dim, "class")
    return Choice("cond", True, f"labels: {what}")


def _noise(data: Data, family: str, objective: Any) -> list[Choice]:
    """ln(sigma) of training: as the data ask for it, or of a preset that is made for them."""
    P_mean, P_std, because = data.P_mean, data.P_std, data.because
    if data.made_for(FAMILIES[family]):
        P_mean, P_std, because = objective.P_mean, objective.P_std, "of the preset, which is made for such images"
    return [Choice("P_mean", P_mean, because), Choice("P_std", P_std, "as P_mean")]


def _edm2(data: Data, preset: Preset) -> list[Choice]:
    network = preset.config.network
    width = Choice("channels", network.model_channels, WIDTH)
    levels = _unet(data, "channel_mult", network.channel_mult, network.attn_resolutions)
    return [_condition(data), width, *levels, *_noise(data, "edm2", preset.config.objective)]


def _score_sde(data: Data, preset: Preset) -> list[Choice]:
    network = preset.config.network
    width = Choice("nf", network.nf, f"channels {WIDTH}")
    return [width, *_unet(data, "ch_mult", network.ch_mult, network.attn_resolutions)]


def _uvit(data: Data, preset: Preset) -> list[Choice]:
    network, objective = preset.config.network, preset.config.objective
    captions, labels = data.dataset.captions is not None, data.dataset.has_labels
    choices = [Choice("captions", True, "the dataset has captions")] if captions else [_condition(data)]
    if not (captions or labels) and objective.cond_dropout:
        choices.append(Choice("cond_dropout", 0.0, "there is no condition to leave out"))
    if labels and not (objective.cond_dropout and network.null_class):
        choices += [Choice("null_class", True, "for guidance"), Choice("cond_dropout", 0.1, "for guidance")]
    patch = network.patch_size if data.made_for(FAMILIES["uvit"]) else _patch(data.resolution)
    choices.append(Choice("patch_size", patch, f"{(data.resolution // patch) ** 2} tokens"))
    choices.append(Choice("embed_dim", network.embed_dim, f"width of tokens {WIDTH}"))
    return [*choices, *(_noise(data, "uvit", objective) if objective.noise_levels == "lognormal" else [])]


def _patch(resolution: int) -> int:
    """Of the divisors of a resolution, the one that comes nearest to 16 patches in a row."""
    return min((d for d in range(1, resolution + 1) if resolution % d == 0), key=lambda d: abs(resolution / d - TOKENS))


def _nvae(data: Data, preset: Preset) -> list[Choice]:
    network = preset.config.network
    choices = [Choice(key, getattr(network, key), WIDTH) for key in ("num_channels_enc", "num_channels_dec")]
    halvings = network.halvings
    while data.resolution % 2**halvings:
        halvings -= 1
    if halvings < network.halvings:
        scales = max(min(network.num_latent_scales, halvings + 1 - network.num_preprocess_blocks), 1)
        blocks = halvings + 1 - scales
        reason = f"{data.resolution} can be halved {halvings} times"
        choices += [Choice(f"num_{side}process_blocks", blocks, reason) for side in ("pre", "post")]
        choices.append(Choice("num_latent_scales", scales, reason))
    return choices


def _for_machine(data: Data, cpu: list[str], gpu: list[str]) -> list[str]:
    return cpu if data.machine == "cpu" else gpu


def _edm2_names(data: Data) -> list[str]:
    return [f"{'latents' if data.latents else 'pixels'}{size}-{data.machine}" for size in (32, 64)]


def _uvit_names(data: Data) -> list[str]:
    if data.dataset.captions is not None:
        return _for_machine(data, ["pixels32-uvit-cpu"], ["mscoco_uvit_small"])
    large = ["imagenet256_uvit_large"] if data.latents else ["cifar10_uvit_small", "celeba64_uvit_small"]
    return _for_machine(data, ["pixels32-uvit-cpu"], large)


def _score_names(data: Data) -> list[str]:
    return _for_machine(data, ["pixels32-vp-cpu"], ["vp/cifar10_ddpmpp_continuous"])


def _nvae_names(data: Data) -> list[str]:
    published = ["nvae-cifar10", "nvae-celeba64", "nvae-celeba256"]
    return _for_machine(data, ["pixels32-nvae-cpu"], published)


FAMILIES = {
    "edm2": Family("EDM2, diffusion", EDM2Training, EDM2_PRESETS, _edm2_names, _edm2),
    "score_sde": Family("a score-SDE model, diffusion", ScoreTraining, SCORE_PRESETS, _score_names, _score_sde),
    "uvit": Family("U-ViT, diffusion by a transformer", UViTTraining, UVIT_PRESETS, _uvit_names, _uvit),
    "nvae": Family("NVAE, a hierarchical VAE", NVAETraining, NVAE_PRESETS, _nvae_names, _nvae),
}
