"""What `dataset_tool.py check` advises on."""

from dataclasses import dataclass

from dnnlib.cli import parse_nimg
from training.config.fields import Config, option

FAMILIES = ("edm2", "score_sde", "uvit", "nvae")  # that are trained by train_{family}.py
# How many images the networks that are meant for a machine want: fewer are soon learned by heart.
MACHINES = {"cpu": 0, "gpu": 10_000, "8gpus": 100_000}


@dataclass(frozen=True, kw_only=True)
class AdviceConfig(Config):
    """What the command that trains on a dataset is to be like."""

    family: str = option("edm2", "Models that the training command is for", choices=FAMILIES)
    machine: str | None = option(
        None, "Machine that it is for", choices=tuple(MACHINES), default_text="this one, by its GPUs"
    )
    duration: int | None = option(
        None,
        "Images that it is to train on",
        low=1,
        parse=parse_nimg,
        metavar="NIMG",
        default_text="as the preset, or less where there are few",
    )
    timing: bool = option(True, "Time a few training steps, to say how long it takes")
