"""What defines a training run, whatever the family: data, EMA, the run itself. One home of every default."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dnnlib.cli import parse_int_list, parse_nimg
from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from training.config.data import DatasetInfo
from training.config.ema import PowerFunctionConfig
from training.config.fields import APART, REQUIRED, Config, all_fields, check_known, option, show
from training.config.metrics import PRECISIONS, check_metrics, parse_metrics
from training.config.samplers import GridConfig, SamplerConfig

Mi = 1 << 20
Ki = 1 << 10
INTERVALS = ("status", "snapshot", "preview", "checkpoint", "diagnose")  # options, in images
MIN_INTERVAL = 1000  # snapshot and state file names count thousands of images
OPTIONS_NAME = "training_options.json"  # in the directory of a run
BY_IMAGE, BY_ROUND = "image", "round"  # what dropout masks depend on
PIXEL_CHANNELS = (1, 3)  # of presets for images; all others are for latents
AUTO = -1  # --batch-gpu=auto, which becomes a number before there is a configuration
T = TypeVar("T", bound="TrainConfig")


def parse_batch_gpu(text: str) -> int:
    """A number of images, or AUTO for 'auto'."""
    return AUTO if text.strip().lower() == "auto" else parse_nimg(text)


def parse_ints(text: str) -> tuple[int, ...]:
    """Whole numbers such as '16,8'; 'none' or '' are no numbers."""
    return () if text.strip().lower() in ("", "none") else tuple(parse_int_list(text))


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
    val_fraction: float = option(
        0.0,
        "Share of the images that are held out: with every snapshot, the loss on them (metric-val_loss.jsonl)",
        low=0,
        below=1,
        default_text="0",
    )
    cache: bool = option(False, "Keep decoded images in memory (small datasets always are)", may_change=True)
    verify: bool = option(True, "Compare the checksums of ZIP entries when they are first read", may_change=True)
    workers: int | None = option(
        None, "Loader processes per training process", low=0, default_text="2 on CUDA, else 0", may_change=True
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
    shard: int = option(
        1,
        "Share out weights, gradients, moments and averages over groups of so many processes (FSDP2), 1 = each has all",
        low=1,
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
    val_images: int = option(1000, "Number of held-out images that are used, evenly spaced", low=1, may_change=True)
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
    on_nonfinite: str | None = option(
        None,
        "What to do where gradients are not finite: set these to 0, skip the step, or stop the run",
        choices=("zero", "skip", "stop"),
        default_text="zero; NVAE: skip",
        may_change=True,
    )
    diagnose: int = option(
        0,
        "Interval of diagnoses, 0 = none: loss by noise level, norms of gradients and weights, activation magnitudes "
        "(diagnosis.jsonl)",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        may_change=True,
    )
    seed: int = option(0, "Random seed", low=0, high=2**32 - 1)
    dropout_masks: str = option(
        BY_IMAGE,
        "Dropout masks by image: the same for any number of processes and --batch-gpu; or from torch's generator, "
        "seeded in each accumulation round, as in earlier versions",
        choices=(BY_IMAGE, BY_ROUND),
        default_text=f"{BY_IMAGE}; that of the run that is continued",
    )

    @property
    def preview_interval(self) -> int:
        """Images between previews; 0 = there are none."""
        return self.snapshot if self.preview is None else self.preview

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
        if self.shard > 1 and self.diagnose:
            raise UserError(f"--diagnose={self.diagnose} needs whole networks, not --shard={self.shard}: leave one out")
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.val_fraction and self.run.val_data:
            raise UserError(f"--val-fraction={self.data.val_fraction:g} and --val-data: give one of them")

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
        """The inverse of `to_json`; options of an earlier version that are missing have their defaults, or are as they
        were then.

        Raises:
            UserError: another family, unknown or missing names, or values that the fields do not allow.
        """
        if not isinstance(values, dict) or not isinstance(values.get("dataset"), dict):
            raise UserError("no dictionary of options")
        family = values.get("family", cls.family)  # earlier versions had only one
        if family != cls.family:
            raise UserError(f"those of train_{family}.py")
        check_known(values, {"family", "dataset", *(field.key for field in all_fields(cls))})
        config = cls.from_flat({"dropout_masks": BY_ROUND, **values})
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

    @classmethod
    def of_begun(cls: type[T], outdir: Path) -> T | None:
        """The configuration of the run in a folder; None = none has begun there.

        Raises:
            UserError: its file is damaged or of another version.
        """
        path = outdir / OPTIONS_NAME
        return cls.load(path) if path.is_file() and any(outdir.glob("training-state-*")) else None

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
