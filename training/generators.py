"""Generators: seeds -> latents, by any kind of model."""

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from training.classes import ClassChoice
from training.conditioning import DataSpec
from training.config.generation import SamplingConfig, VAESampling
from training.denoiser import Denoiser
from training.guidance import ClassifierGuided, Unconditional, guided, weight_of
from training.losses_vae import image_values, to_bytes
from training.networks.classifier import NoisyClassifier
from training.networks.nvae import NVAE
from training.networks.nvae_layers import effective_weights
from training.networks.nvae_readjust import readjust_batch_norms_
from training.samplers.grids import grid_for
from training.samplers.noise import StackedRandomGenerator
from training.samplers.ode import AfterUpdate
from training.samplers.sampler import Sampler, unchanged

SHOWN_PROMPTS = 100  # that `describe` lists; of more, it says a hash

PICTURED_TEMPERATURES = (0.7, 0.8, 0.9)  # beside 1, as published


class Generator(Protocol):
    """Makes latents from random numbers, one generator per image.

    The draws come in the order noise, condition, then what the call needs.
    """

    spec: DataSpec

    def noise(self, rnd: StackedRandomGenerator) -> torch.Tensor:
        """What images are made of, [N, ...]."""
        ...

    def condition(self, rnd: StackedRandomGenerator) -> torch.Tensor | None:
        """Conditions of the images, [N, ...], or None."""
        ...

    def __call__(self, noise: torch.Tensor, cond: torch.Tensor | None, rnd: StackedRandomGenerator) -> torch.Tensor:
        """Final latents, as an encoder decodes them, [N, C, H, W]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What made the images, as plain JSON values."""
        ...


@dataclass(frozen=True)
class PromptChoice:
    """The rule by which images get texts: the one of number (seed modulo how many there are).

    Args:
        prompts: the texts.
        encode: texts -> contexts.
    """

    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], torch.Tensor]

    def of_seeds(self, seeds: Sequence[int], device: torch.device | str) -> torch.Tensor:
        """The context of each seed, [n, tokens, width]."""
        texts = [self.prompts[seed % len(self.prompts)] for seed in seeds]
        different = list(dict.fromkeys(texts))
        return self.encode(different).to(device)[[different.index(text) for text in texts]]

    def describe(self) -> dict[str, Any]:
        """The rule, as plain JSON values."""
        rule = {"labels": f"prompt seed modulo {len(self.prompts)}"}
        if len(self.prompts) <= SHOWN_PROMPTS:
            return {**rule, "prompts": list(self.prompts)}
        digest = hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()
        return {**rule, "prompts_sha256": digest}


class DiffusionGenerator:
    """Images by a function that follows a denoiser from noise.

    Args:
        spec: shape of the noise, and what conditions are.
        sample: (noise, cond, rnd) -> latents. Where known parts can be put back, or the denoiser exchanged: also with
            `control` and `wrap`, see `__call__`.
        classes: the rule by which images get classes.
        facts: what `sample` is, as plain JSON values.

    `prompts` is the rule by which images get texts; None = all follow the empty text, where they follow texts.
    """

    prompts: PromptChoice | None = None

    def __init__(
        self,
        spec: DataSpec,
        sample: Callable[..., torch.Tensor],
        classes: ClassChoice | None = None,
        facts: dict[str, Any] | None = None,
    ):
        self.spec, self.sample, self.facts = spec, sample, facts or {}
        self.classes = classes or ClassChoice()

    def noise(self, rnd: StackedRandomGenerator) -> torch.Tensor:
        return rnd.randn([len(rnd), *self.spec.shape])

    def condition(self, rnd: StackedRandomGenerator) -> torch.Tensor | None:
        if self.prompts is not None:
            return self.prompts.of_seeds(rnd.seeds, rnd.generators[0].device)
        return self.spec.conditioning.draw(rnd, len(rnd), self.classes.of_seeds(rnd.seeds))

    def __call__(
        self,
        noise: torch.Tensor,
        cond: torch.Tensor | None,
        rnd: StackedRandomGenerator,
        control: AfterUpdate | None = None,
        wrap: Callable[[Denoiser], Denoiser] | None = None,
    ) -> torch.Tensor:
        """Final latents [N, C, H, W].

        Args:
            control: puts known parts back after each update of the sampler.
            wrap: makes the denoiser that is followed of the one that is known.
        """
        given = {"control": control, "wrap": wrap}
        return self.sample(noise, cond, rnd, **{name: value for name, value in given.items() if value is not None})

    def describe(self) -> dict[str, Any]:
        labels = self.classes.describe() if self.spec.conditioning.num_classes else {"labels": "none"}
        labels = labels if self.prompts is None else self.prompts.describe()
        return {**labels, **self.facts}


def diffusion_generator(
    denoiser: Denoiser,
    spec: DataSpec,
    sampling: SamplingConfig,
    guide: Denoiser | NoisyClassifier | None = None,
    precision: str = "fp32",
) -> DiffusionGenerator:
    """The generator that a sampler and a denoiser are.

    Args:
        spec: what the denoiser's images and conditions look like.
        guide: guiding denoiser, used where guidance acts; None = the denoiser itself, without a condition.
            Or a classifier, whose classes are then those of the images.
        precision: what the denoiser computes in, for `describe`.
    """
    guidance, by_classifier = sampling.guidance, isinstance(guide, NoisyClassifier)
    sampler = Sampler(sampling.sampler, grid_for(sampling.sampler, denoiser))
    combine: Callable[[], Denoiser] | None = None  # for each batch, as rules of guidance may remember its last step
    if isinstance(guide, NoisyClassifier):
        spec = dataclasses.replace(spec, conditioning=guide.spec.conditioning)
        weight = weight_of(guidance, none=0.0)
        combine = functools.partial(ClassifierGuided, denoiser, guide, weight)
    elif guidance.acts:
        gnet = Unconditional(denoiser) if guide is None else guide
        combine = functools.partial(guided, denoiser, gnet, guidance, sampler.grid.sigmas)

    def sample(
        noise: torch.Tensor,
        cond: torch.Tensor | None,
        rnd: StackedRandomGenerator,
        control: AfterUpdate = unchanged,
        wrap: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
    ) -> torch.Tensor:
        D = denoiser if combine is None else combine()
        return sampler(wrap(D), noise, cond, randn_like=rnd.randn_like, after_update=control)

    facts = {"sampler": sampler.describe() | guidance.describe(by_classifier), "precision": precision}
    return DiffusionGenerator(spec, sample, ClassChoice.of(sampling, spec.conditioning.num_classes), facts)


class VAEGenerator:
    """Images by an NVAE from draws of its priors.

    Args:
        net: the network, in eval mode. It stays as it is: batch norms are readjusted in a copy, when images are first
            asked for.
        sampling: its section `vae` says how.
    """

    def __init__(self, net: NVAE, sampling: SamplingConfig):
        self.net, self.vae, self.spec = net, sampling.vae, net.spec
        self.temperature = 1.0 if self.vae.temperature is None else self.vae.temperature

    @functools.cached_property
    def adjusted(self) -> NVAE:
        """The network with batch norms that suit the temperature."""
        if not self.vae.readjust_bn:
            return self.net
        net = copy.deepcopy(self.net)
        readjust_batch_norms_(net, self.temperature, self.vae.readjust_bn)
        return net

    def noise(self, rnd: StackedRandomGenerator) -> torch.Tensor:
        return rnd.randn([len(rnd), self.net.noise_size])

    def condition(self, rnd: StackedRandomGenerator) -> None:
        return None

    @torch.no_grad()
    def __call__(self, noise: torch.Tensor, cond: torch.Tensor | None, rnd: StackedRandomGenerator) -> torch.Tensor:
        net, decoder = self.adjusted, self.net.decoder
        with effective_weights(net):
            logits = net.sample(len(noise), self.temperature, net.split_noise(noise))
        if self.vae.pixels == "draw":
            images = decoder.sample(logits, decoder.draws(logits, rnd.randn_like))
        else:
            images = decoder.mean(logits)
        return 2 * net.crop(images) - 1

    def describe(self) -> dict[str, Any]:
        return {"labels": "none", "sampler": self.vae.describe(), "precision": self.net.precision}


@torch.no_grad()
def vae_pictures(net: NVAE, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """What shows the training of an NVAE beside its samples: reconstructions, and samples at lower temperatures.

    Args:
        latents: real images in [-1, 1].
    """
    count, device = len(latents), latents.device
    rnd = StackedRandomGenerator(device, range(count))
    x = image_values(net.decoder, to_bytes(latents), net.loss_crop, rnd.randn_like)
    with effective_weights(net):
        mean = net.decoder.mean(net(x, torch.zeros_like).logits)
    pictures = {"reconstructions": 2 * net.crop(mean) - 1}
    for temperature in PICTURED_TEMPERATURES:
        rnd = StackedRandomGenerator(device, range(count))
        generator = VAEGenerator(net, SamplingConfig(vae=VAESampling(temperature=temperature)))
        pictures[f"t{temperature:g}"] = generator(generator.noise(rnd), None, rnd)
    return pictures
