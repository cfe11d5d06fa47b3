"""Consistency tuning (Geng et al. 2024, arXiv 2406.14548): pairs of noise levels, optimiser, run and presets.

What is tuned is the network of a snapshot; nothing of it is chosen here.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dnnlib.errors import UserError
from training.config.edm2 import TRAINING_PRESETS, EDM2Network, EDM2Optimizer
from training.config.ema import PowerFunctionConfig
from training.config.fields import APART, FROM_PRESET, REQUIRED, Config, option
from training.config.samplers import GridConfig, SamplerConfig
from training.config.training import DataConfig, Ki, Mi, Preset, RunConfig, TrainConfig, parse_nimg
from training.config.uvit import UViTNetwork

# Networks that can have EDM's preconditioning, by their names in the registry.
NETWORKS: dict[str, type[Config]] = {"edm2.Precond": EDM2Network, "uvit.UViTDenoiser": UViTNetwork}


@dataclass(frozen=True, kw_only=True)
class ConsistencyObjective(Config):
    """Pairs of noise levels t > r, and the distance between what the network makes of the same image at both."""

    P_mean: float = option(
        -0.8, "Mean of ln(t), the higher noise level of a pair", flag="--P_mean", default_text=FROM_PRESET
    )
    P_std: float = option(1.6, "Standard deviation of ln(t)", flag="--P_std", above=0)
    q: float = option(
        4.0, "Factor by which the levels of a pair come closer from stage to stage", above=1, default_text="4"
    )
    k: float = option(8.0, "How much farther apart low levels are: by 1 + k sigmoid(-t)", low=0, default_text="8")
    stage: int = option(4 * Mi, "Images per stage", low=1, parse=parse_nimg, metavar="NIMG", default_text=FROM_PRESET)
    stages: int = option(4, "Stages; the last one does not end", low=1, high=24)
    huber: float = option(
        0.03,
        "Distances of whole images below it count by their square, larger ones as they are",
        above=0,
        default_text="0.03",
    )
    cond_dropout: float = option(
        0.0, "Probability that an image is tuned without its condition, for guidance", low=0, high=1, default_text="0"
    )


@dataclass(frozen=True, kw_only=True)
class ConsistencyData(DataConfig):
    """The images that a run learns from; whether they have classes or captions is a matter of the network."""

    cond: bool = option(False, flag=None)


@dataclass(frozen=True, kw_only=True)
class ConsistencyRun(RunConfig):
    """A run that begins with a trained network; its pictures take as many evaluations as there are noise levels."""

    init_from: str = option(
        "",
        "Snapshot whose network is tuned: a file, the folder of a training run, or a URL; one with EDM's "
        "preconditioning, such as train_edm2.py makes, or train_uvit.py with --predict=edm",
        metavar="FILE",
        default_text=REQUIRED,
    )
    preview_steps: int = option(RunConfig.preview_steps, flag=None, low=1, may_change=True)


@dataclass(frozen=True, kw_only=True)
class ConsistencyTraining(TrainConfig):
    """A run that tunes the network of a snapshot.

    `network` is what the snapshot says of it, of a class in `NETWORKS`; in a preset, what it is meant for.
    """

    family: ClassVar[str] = "consistency"
    data: ConsistencyData = ConsistencyData()
    network: Any = dataclasses.field(default=None, metadata=APART)
    objective: ConsistencyObjective = ConsistencyObjective()
    optimizer: EDM2Optimizer = EDM2Optimizer(lr=0.005, decay=0, rampup_Mimg=0)
    ema: PowerFunctionConfig = PowerFunctionConfig()
    run: ConsistencyRun

    def sampler(self, steps: int = GridConfig.num_steps) -> SamplerConfig:
        """Consistency sampling, whose noise levels say the steps."""
        return SamplerConfig(solver="consistency")

    def to_json(self) -> dict[str, Any]:
        """As of other runs, and `network` with its name in the registry."""
        name = next(name for name, kind in NETWORKS.items() if kind is type(self.network))
        return {**super().to_json(), "network": {"name": name, **self.network.to_json()}}

    @classmethod
    def from_json(cls, values: Any) -> "ConsistencyTraining":
        """The inverse of `to_json`.

        Raises:
            UserError: as of other runs; or a network that cannot be tuned.
        """
        options = dict(values) if isinstance(values, dict) else {}
        network = options.pop("network", None)
        config = super().from_json(options)
        arguments = dict(network) if isinstance(network, dict) else {}
        name = arguments.pop("name", None)
        if not isinstance(name, str) or name not in NETWORKS:
            raise UserError("no network that could be tuned")
        return dataclasses.replace(config, network=NETWORKS[name].from_json(arguments))

    def check_resumable(self, stored: TrainConfig, outdir: Path) -> None:
        """As of other runs, which have their network among the options."""
        super().check_resumable(stored, outdir)
        if self.network != stored.network:
            raise UserError(
                f"{outdir} tunes another network than that of --init-from={self.run.init_from}: choose another --outdir"
            )


# ---------------------------------------------------------------------------------------------------------
# Presets


def _digits() -> Preset:
    """The EDM2 network of the preset digits, for images by one or two evaluations, in 70 CPU seconds of one thread.

    Of 1,797 images, fd_pixels is 0.18 by one evaluation (three seeds: 0.181 to 0.187) and 0.14 by two (0.132 to 0.140);
    by 63 evaluations of the network before, 0.093. docs/few_steps.md has more.
    """
    config = ConsistencyTraining(
        network=TRAINING_PRESETS["digits"].config.network,
        objective=ConsistencyObjective(P_mean=-0.6, stage=20 * Ki),
        optimizer=EDM2Optimizer(lr=0.01, decay=64, rampup_Mimg=0),
        run=ConsistencyRun(duration=80 * Ki, batch=128, status=4 * Ki, snapshot=16 * Ki, checkpoint=40 * Ki),
    )
    return Preset(config, resolution=8, channels=1, classes=10)


CONSISTENCY_PRESETS: dict[str, Preset] = {"digits-ect": _digits()}
