"""What makes images: networks, sampler, guidance, and what they compute in."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from dnnlib.cli import given_options
from dnnlib.errors import UserError
from training.config.edm2 import GENERATION_PRESETS
from training.config.fields import Config, all_fields, option, refuse_changed
from training.config.guidance import GuidanceConfig
from training.config.metrics import PRECISIONS
from training.config.names import unknown_preset
from training.config.samplers import SamplerConfig

KEPT_NETWORKS = 2 << 30  # bytes of networks that stay in memory where several are used in turn


def check_seed(largest: int) -> None:
    """Check the largest of some seeds.

    Raises:
        UserError: random generators would take it for a smaller one.
    """
    if largest >= 2**32:
        raise UserError(f"seed {largest} is too large: seeds are less than 2^32, beyond which images would repeat")


@dataclass(frozen=True, kw_only=True)
class VAESampling(Config):
    """How an NVAE makes images. None = the default, which is in brackets."""

    temperature: float | None = option(
        None, "Standard deviations of NVAE's priors are multiplied by it", above=0, high=10, default_text="1"
    )
    readjust_bn: int | None = option(
        None,
        "Batches of samples that NVAE's batch norms are adapted to at that temperature; published: 500",
        low=0,
        high=100_000,
        default_text="0",
    )
    pixels: str | None = option(
        None, "NVAE's pixels: the mean of their distribution, or drawn from it", choices=("mean", "draw"),
        default_text="mean",
    )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What it stands for, as plain JSON values."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "readjust_bn": self.readjust_bn or 0,
            "pixels": self.pixels or "mean",
        }


@dataclass(frozen=True, kw_only=True)
class NetworksConfig(Config):
    """The networks that make images."""

    preset: str | None = option(None, "Published networks and guidance; options that are given win", metavar="NAME")
    net: str | None = option(
        None,
        "Network snapshot: a file, the folder of a training run (its newest snapshot), a Hugging Face folder, or a URL "
        "(http, file, hf)",
        metavar="FILE",
    )
    gnet: str | None = option(None, "Guiding network snapshot", metavar="FILE")
    classifier: str | None = option(
        None,
        "Classifier of noisy images (train_classifier.py), by which a network that knows no classes is asked for them: "
        "--guidance is its weight then",
        metavar="FILE",
    )
    arch: str | None = option(
        None,
        "Training preset that names the architecture of published files that do not say it (see the training commands' "
        "--list-presets)",
        metavar="PRESET",
    )
    encoder: str | None = option(
        None,
        "VAE that decodes latents: owner/repo on the Hugging Face hub, a folder, a .safetensors file, or U-ViT's "
        "autoencoder_kl.pth",
        metavar="NAME",
        default_text="the one that the snapshot names",
    )
    text_encoder: str | None = option(
        None,
        "Text model of CLIP for prompts: owner/repo on the Hugging Face hub, or a folder",
        metavar="NAME",
        default_text="the one that the snapshot names",
    )
    trust_encoder: bool = option(False, "Fetch whatever VAE the snapshot names on the hub")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How images are made of noise."""

    class_idx: str | None = option(
        None,
        "Class of the images by number or name; several, such as 207,360 or 0-9, take turns: seed modulo how many",
        flag="--class",
        metavar="LIST",
    )
    class_policy: str | None = option(
        None,
        "Classes where --class names none: random = drawn from the seed, balanced = seed modulo the number of classes",
        choices=("random", "balanced"),
        default_text="random",
    )
    prompt: tuple[str, ...] = option(
        (),
        "Text that images follow; may be repeated, and images take turns: seed modulo how many",
        metavar="TEXT",
        items=(0, 10_000),
        multiple=True,
    )
    prompts: str | None = option(
        None,
        "File of prompts, one per line; or a set of captions, of which one per image is drawn: a dataset "
        "(dataset_tool.py captions), annotations of MS-COCO (.json), a table of filename,caption (.csv, .tsv)",
        metavar="FILE",
    )
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    vae: VAESampling = VAESampling()
    precision: str = option(
        "auto", "What the networks compute in; auto = fp16 on GPUs, fp32 on CPUs", choices=("auto", *PRECISIONS)
    )
    compiled: bool = option(
        False,
        "On GPUs, let torch.compile make the networks' kernels (a CPU has faster ones in any case)",
        flag="--compile",
    )
    device: str = option(
        "auto",
        "Where to compute; auto = the first of cuda, mps, cpu that is there",
        choices=("auto", "cpu", "cuda", "mps"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.guidance.check_sampler(self.sampler)

    def check_kind(self, is_denoiser: bool, family: str) -> None:
        """Check that nothing was chosen that networks of a kind do not know.

        Raises:
            UserError: something was.
        """
        refuse_changed([self.vae] if is_denoiser else [self.sampler, self.guidance], family)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """Networks, and how images are made with them."""

    networks: NetworksConfig = NetworksConfig()
    sampling: SamplingConfig = SamplingConfig()

    @classmethod
    def take(cls, opts: dict[str, Any]) -> "GenerationConfig":
        """Take these options out of all those of a command, and add networks and guidance of the preset.

        Raises:
            UserError: they do not go together, or there is no such preset.
        """
        names = [field.key for field in all_fields(cls)]
        given = {name: value for name in names if (value := opts.pop(name)) is not None}
        config = cls.from_flat(given)
        useless = config.sampling.sampler.without_effect(given)
        if useless:
            chosen = f"--sampler={config.sampling.sampler.solver}"
            chosen += " and --sigmas" if config.sampling.sampler.grid.sigmas is not None else ""
            raise UserError(f"{useless[0]} has no effect with {chosen}: leave it out")
        config.sampling.guidance.check_given(given)
        if config.networks.classifier is not None and (config.networks.gnet or config.networks.preset) is not None:
            given = "--gnet" if config.networks.gnet is not None else "--preset"
            raise UserError(f"--classifier and {given} both say what guides: give one of them")
        net, gnet, guidance = config.networks.net, config.networks.gnet, config.sampling.guidance.guidance
        preset = config.networks.preset
        if preset is not None:
            chosen = GENERATION_PRESETS.get(preset)
            if chosen is None:
                raise unknown_preset("--preset", preset, GENERATION_PRESETS)
            weighted = config.sampling.guidance.guidance_table is not None
            net, guidance = net or chosen.net, guidance if weighted else given.get("guidance", chosen.guidance)
            if weighted or guidance != 1:
                gnet = gnet or chosen.gnet
        if net is None:
            raise UserError("which network? Give --net or --preset (see generate_images.py --list-presets)")
        return cls.from_flat({"net": net, "gnet": gnet, "guidance": guidance}, config)

    def command(self, ctx: click.Context, leave_out: Sequence[str] = ()) -> str:
        """The command line without presets."""
        networks, guidance = self.networks, self.sampling.guidance.guidance
        options = [f"--net={shlex.quote(str(networks.net))}"]
        options += [f"--gnet={shlex.quote(networks.gnet)}"] if networks.gnet is not None else []
        options += [f"--guidance={guidance:g}"] if guidance != 1 else []
        options += given_options(ctx, leave_out=["preset", "net", "gnet", "guidance", *leave_out])
        return " \\\n    ".join(["python generate_images.py", *options])
