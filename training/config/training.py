"""What defines a training run, whatever the family: data, EMA, the run itself. One home of every default."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dnnlib.cli import parse_int_list, parse_nimg
from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from training.config.data import DatasetInfo
from training.config.fields import APART, FROM_PRESET, REQUIRED, Config, all_fields, check_known, option, show
from training.config.metrics import PRECISIONS, check_metrics, parse_metrics
from training.config.samplers import GridConfig, SamplerConfig

Mi = 1 << 20
Ki = 1 << 10
INTERVALS = ("status", "snapshot", "preview", "checkpoint")  # options, in images
MIN_INTERVAL = 1000  # snapshot and state file names count thousands of images
MIN_STD = 0.001  # file names of EMA profiles have three decimals
MAX_STD = 12**-0.5  # of the flat average (`phema`)
MAX_LIST = 1000
OPTIONS_NAME = "training_options.json"  # in the directory of a run
PIXEL_CHANNELS = (1, 3)  # of presets for images; all others are for latents
AUTO = -1  # --batch-gpu=auto, which becomes a number before there is a configuration
T = TypeVar("T", bound="TrainConfig")


def parse_batch_gpu(text: str) -> int:
    """A number of images, or AUTO for 'auto'."""
    return AUTO if text.strip().lower() == "auto" else parse_nimg(text)


def parse_ints(text: str) -> tuple[int, ...]:
    """Whole numbers such as '16,8'; 'none' or '' are no numbers."""
    return () if text.strip().lower() in ("", "none") else tuple(parse_int_list(text))


def parse_std_list(text: str) -> tuple[float, ...]:
    """Parse widths such as '0.05', '0.05,0.10' or '0.010,0.015,...,0.250' (the last = 49 even steps).

    Raises:
        ValueError: not numbers, outside [0.001, 0.289), or '...' that does not reach its end in even steps.
    """
    stds: list[float] = []
    parts = [part.strip() for part in re.sub(r"^\[|\]$", "", text.strip()).split(",")]
    for i, part in enumerate(parts):
        if part == "...":
            if len(stds) < 2 or i + 1 >= len(parts):
                raise ValueError(f"{text!r}: '...' needs two values before it and one after it")
            continue
        try:
            value = float(part)
        except ValueError:
            raise ValueError(f"{text!r}: {part!r} is not a number") from None
        if not MIN_STD <= value < MAX_STD:
            raise ValueError(f"{text!r}: an EMA std must lie between {MIN_STD} and {MAX_STD:.3f}, not {part}")
        if i > 0 and parts[i - 1] == "...":
            first, step = stds[-1], stds[-1] - stds[-2]
            count = round((value - first) / step) if step != 0 else 0
            if not 1 <= count <= MAX_LIST or abs(first + count * step - value) > 1e-6:
                raise ValueError(f"{text!r}: even steps of {step:.6g} from {first:g} do not reach {value:g}")
            stds += [round(first + k * step, 9) for k in range(1, count)]
        stds.append(value)
    return tuple(stds)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """The images that a run learns from."""

    data: str = option(
        "", "Training images: folder or ZIP file", metavar="ZIP|DIR", default_text=REQUIRED, may_change=True
    )
    cond: bool = option(True, "Train a class-conditional model")
    captions: bool = option(False, flag=None)
    encoder: str = option(
        "",
        "VAE that made the latents: owner/repo on the Hugging Face hub, a folder or a file; raw = none is known",
        metavar="NAME",
        default_text="what dataset.json records",
    )
    trust_encoder: bool = option(False, "Fetch whatever VAE dataset.json names on the hub", may_change=True)
    xflip: bool = option(False, "Train on mirrored images, too")
    cache: bool = option(False, "Keep decoded images in memory (small datasets always are)", may_change=True)
    verify: bool = option(True, "Compare the checksums of ZIP entries when they are first read", may_change=True)
    workers: int | None = option(
        None, "Loader processes per training process", low=0, default_text="2 on CUDA, else 0", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class PowerFunctionConfig(Config):
    """The EMA profiles that a run tracks (EDM2, Section 3)."""

    ema_std: tuple[float, ...] = option(
        (0.05, 0.10),
        "Widths of the tracked EMA profiles",
        parse=parse_std_list,
        low=MIN_STD,
        below=MAX_STD,
        items=(1, 64),
        default_text="0.05,0.10",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({f"{std:.3f}" for std in self.ema_std}) < len(self.ema_std):
            raise UserError(f"--ema-std={show(self.ema_std)}: two widths share a file name (three decimals count)")


@dataclass(frozen=True, kw_only=True)
class EMAConfig(PowerFunctionConfig):
    """The profiles for post-hoc EMA, and the exponential average of the published models."""

    ema_rate: float = option(
        0.999,
        "Decay per step of the exponential average that is saved as -ema, 0 = none",
        low=0,
        below=1,
        default_text=FROM_PRESET,
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Length, batches, arithmetic, outputs and measurements of a run; numbers of images are absolute."""

    duration: int = option(help="Training duration", low=1, parse=parse_nimg, metavar="NIMG", may_change=True)
    init_from: str = option(
        "", "Start with the weights of this snapshot (a file or URL), as far as they fit", metavar="FILE"
    )
    batch: int = option(help="Images per optimiser step, over all processes", low=1, parse=parse_nimg, metavar="NIMG")
    batch_gpu: int = option(
        0,
        "Limit of images per process and round, 0 = none; auto = as many as fit into memory, see --plan",
        low=0,
        parse=parse_batch_gpu,
        metavar="NIMG",
        may_change=True,
    )
    device: str = option(
        "auto",
        "Where to compute; auto = the first of cuda, mps, cpu that is there",
        choices=("auto", "cpu", "cuda", "mps"),
        may_change=True,
    )
    timeout: int | None = option(
        None,
        "Minutes that the processes of a job wait for each other",
        low=1,
        high=10**6,
        default_text="60",
        may_change=True,
    )
    precision: str = option(
        "auto",
        "What the network computes in; auto = fp16 on GPUs, fp32 on CPUs",
        choices=("auto", *PRECISIONS),
        may_change=True,
    )
    ls: float = option(1.0, "Loss scaling", above=0, default_text="1")
    bench: bool = option(True, "Let cuDNN choose its fastest kernels", may_change=True)
    compile: bool = option(False, "Let torch.compile make the network's kernels", may_change=True)
    checkpoint_activations: bool = option(
        False, "Compute activations twice instead of keeping them: less memory, more time", may_change=True
    )
    status: int = option(
        128 * Ki,
        "Interval of status lines, 0 = only at the end",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        default_text="128Ki; digits: 4Ki",
        may_change=True,
    )
    snapshot: int = option(
        8 * Mi,
        "Interval of network snapshots",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        default_text="8Mi; digits: 16Ki",
        may_change=True,
    )
    preview: int | None = option(
        None,
        "Interval of pictures of what is learned, 0 = none",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        default_text="as --snapshot",
        may_change=True,
    )
    preview_images: int | None = option(
        None, "Images per picture", low=1, high=1024, default_text="100 below 64x64, else 32", may_change=True
    )
    preview_steps: int = option(18, "Sampling steps of pictures", low=1, may_change=True)
    checkpoint: int = option(
        128 * Mi,
        "Interval of training states",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        default_text="128Mi; digits: 48Ki",
        may_change=True,
    )
    checkpoint_minutes: float = option(
        0.0,
        "Also save a training state where the last one is so many minutes old, 0 = not",
        low=0,
        default_text="0",
        may_change=True,
    )
    keep_checkpoints: int = option(2, "Number of training states that are kept, the newest", low=1, may_change=True)
    milestones: int = option(
        0,
        "Interval of training states that are kept for good, 0 = none",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        may_change=True,
    )
    slice: int = option(
        0,
        "Stop after so many images of this start, as if asked to; 0 = do not",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        may_change=True,
    )
    max_time: float = option(
        0.0, "Likewise after so many hours, 0 = do not", low=0, metavar="HOURS", default_text="0", may_change=True
    )
    metrics: tuple[str, ...] = option(
        (),
        "Metrics of every snapshot, such as fid,fd_dinov2 (see calculate_metrics.py)",
        parse=lambda text: tuple(parse_metrics(text)),
        may_change=True,
    )
    metrics_ref: str = option("", "Reference statistics for --metrics: a file or URL", metavar="FILE", may_change=True)
    metrics_num: int = option(50000, "Images to generate for --metrics", low=2, may_change=True)
    val_data: str = option(
        "",
        "Images that are not trained on: with every snapshot, the loss on them (metric-val_loss.jsonl)",
        metavar="ZIP|DIR",
        may_change=True,
    )
    val_images: int = option(1000, "Number of them that are used, evenly spaced", low=1, may_change=True)
    tracker: str = option(
        "none",
        "Report to this service, too, whose package has to be installed",
        choices=("none", "wandb", "trackio"),
        may_change=True,
    )
    on_divergence: str = option(
        "stop",
        "What to do when the loss is far above its start, or weights are too large for snapshots",
        choices=("stop", "warn"),
        may_change=True,
    )
    seed: int = option(0, "Random seed", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metrics(self.metrics)
        if bool(self.metrics) != bool(self.metrics_ref):
            raise UserError("--metrics and --metrics-ref belong together: give both")
        intervals = {name: getattr(self, name) or 0 for name in INTERVALS}
        uneven = [f"--{name}={interval}" for name, interval in intervals.items() if interval % self.batch != 0]
        if uneven:
            raise UserError(
                f"{', '.join(uneven)} must be multiples of --batch={self.batch} (or 0 = only at the end); "
                f"what is not given comes from the preset"
            )
        if self.milestones % (self.checkpoint or self.milestones + 1):
            raise UserError(
                f"--milestones={self.milestones} must be a multiple of --checkpoint={self.checkpoint}, as only "
                "states that are saved can be kept"
            )
        for name in ("snapshot", "preview", "checkpoint"):
            if 0 < intervals[name] < MIN_INTERVAL:
                raise UserError(
                    f"--{name} must be at least {MIN_INTERVAL} images (names count thousands), or 0 = only at the end"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A training run. A family derives its own, with the classes of its network, objective and optimiser.

    Its JSON is flat: every option under its name, beside `family` and `dataset`.
    """

    family: ClassVar[str]  # train_{family}.py trains it
    preset: str = option("", "Configuration preset", may_change=True)
    data: DataConfig = DataConfig()
    network: Any = None
    objective: Any = None
    optimizer: Any = None
    ema: PowerFunctionConfig = PowerFunctionConfig()
    run: RunConfig
    dataset: DatasetInfo | None = dataclasses.field(default=None, metadata=APART)

    def notes(self) -> list[str]:
        """What the user should know about this configuration, a line each."""
        return []

    def sampler(self, steps: int = GridConfig.num_steps) -> SamplerConfig:
        """What makes images during the run, for pictures and metrics."""
        return SamplerConfig(grid=GridConfig(num_steps=steps))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: all options, `family` and `dataset`."""
        dataset = None if self.dataset is None else self.dataset.to_json()
        return {"family": self.family, **self.flat(), "dataset": dataset}

    @classmethod
    def from_json(cls: type[T], values: Any) -> T:
        """The inverse of `to_json`; options of an earlier version that are missing have their defaults.

        Raises:
            UserError: another family, unknown or missing names, or values that the fields do not allow.
        """
        if not isinstance(values, dict) or not isinstance(values.get("dataset"), dict):
            raise UserError("no dictionary of options")
        family = values.get("family", cls.family)  # earlier versions had only one
        if family != cls.family:
            raise UserError(f"those of train_{family}.py")
        check_known(values, {"family", "dataset", *(field.key for field in all_fields(cls))})
        config = cls.from_flat(values)
        return dataclasses.replace(config, dataset=DatasetInfo.from_json(values["dataset"]))

    def save(self, path: Path) -> None:
        """Write the JSON file that `load` reads."""
        with atomic_write(path, "w") as f:
            json.dump(self.to_json(), f, indent=2)
            f.write("\n")

    @classmethod
    def load(cls: type[T], path: Path) -> T:
        """The configuration of a JSON file.

        Raises:
            UserError: the file is damaged or of another version.
        """
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (ValueError, RecursionError) as err:
            raise UserError(f"{path}: not the options of a training run ({err}): choose another --outdir") from None

    def check_resumable(self, stored: "TrainConfig", outdir: Path) -> None:
        """Check that a run in `outdir` of the stored options may continue with these.

        Raises:
            UserError: an option that a running training cannot change differs from the stored one.
        """
        ours, theirs = self.flat(), stored.flat()
        for field in all_fields(type(self)):
            if not field.option.may_change and ours[field.key] != theirs[field.key]:
                raise UserError(
                    f"{outdir} was trained with {field.flag}={show(theirs[field.key])}, not {show(ours[field.key])}: "
                    f"repeat its options or choose another --outdir"
                )
        assert self.dataset is not None and stored.dataset is not None
        before, now = stored.dataset.to_json(), self.dataset.to_json()
        for name in (name for name in before if before[name] != now[name]):
            change = "their content differs" if name == "content_hash" else f"{name} was {before[name]}, is {now[name]}"
            raise UserError(
                f"{outdir} was trained on other data than --data={self.data.data} ({change}): "
                f"restore the data or choose another --outdir"
            )


@dataclass(frozen=True)
class Preset:
    """A named configuration, and the data that it is meant for.

    Args:
        config: all but the data.
        resolution, channels, classes: of what the network sees.
        context: number and width of the tokens that captions become; zeros = no captions.
        published: results of the published network, such as 'FID 2.20'; '' = none.
        sampler: of the published results; None = the default one.
        speed: images per second, where it was measured, and on what.
        cost: of presets for own images, which may have any number of channels: the time and machines that they are
            meant for; '' = it is of a published model or of the digits.
    """

    config: TrainConfig
    resolution: int
    channels: int
    classes: int
    published: str = ""
    sampler: SamplerConfig | None = None
    context: tuple[int, int] = (0, 0)
    speed: str = ""
    cost: str = ""

    @property
    def size(self) -> str:
        """Height, width and channels of what the network sees."""
        return f"{self.resolution}x{self.resolution}x{self.channels}"

    def fits(self, resolution: int, channels: int, latents: bool) -> bool:
        """Whether data of this size are such as the preset is meant for.

        Args:
            channels: stored ones; those of latents may be mean and standard deviation.
        """
        wanted = (self.channels, 2 * self.channels) if latents else (self.channels,)
        same_kind = resolution == self.resolution and latents == (self.channels not in PIXEL_CHANNELS)
        return same_kind and (bool(self.cost) or channels in wanted)
