"""What defines a training run: one frozen record that goes to JSON and back."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from training.config.data import DatasetInfo

# Fields that may differ between the stored and the given options when a run is resumed.
MAY_CHANGE = {
    "data",
    "preset",
    "duration",
    "batch_gpu",
    "device",
    "precision",
    "bench",
    "compile",
    "checkpoint_activations",
    "workers",
    "cache",
    "status",
    "snapshot",
    "checkpoint",
    "metrics",
    "metrics_ref",
    "metrics_num",
}
OPTION_NAMES = {"P_mean": "--P_mean", "P_std": "--P_std", "rampup_Mimg": "--preset's rampup_Mimg"}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Each field is the command line option of that name; numbers of images are absolute.

    P_mean and P_std describe ln(sigma) in training (EDM2, Table 6), `lr` and `decay` are the reference learning rate
    and batch count of `learning_rate_schedule`, `ema_std` the relative widths of the EMA profiles.
    """

    data: str
    preset: str
    cond: bool
    duration: int
    batch: int
    channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float
    P_mean: float
    P_std: float
    lr: float  # reference learning rate
    decay: float  # batches before the learning rate decays; 0 = never
    rampup_Mimg: float
    ema_std: tuple[float, ...]
    ls: float  # loss scaling
    seed: int
    batch_gpu: int  # images per process and round; 0 = no limit
    device: str
    precision: str
    bench: bool
    workers: int
    status: int
    snapshot: int
    checkpoint: int
    dataset: DatasetInfo
    xflip: bool = False
    cache: bool = False
    metrics: tuple[str, ...] = ()
    metrics_ref: str = ""
    metrics_num: int = 50000
    compile: bool = False
    checkpoint_activations: bool = False

    def network_kwargs(self) -> dict[str, Any]:
        """Arguments of `Precond` beside the image shape."""
        return dict(
            label_dim=self.dataset.label_dim,
            model_channels=self.channels,
            channel_mult=list(self.channel_mult),
            num_blocks=self.num_blocks,
            attn_resolutions=list(self.attn_resolutions),
            dropout=self.dropout,
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "TrainConfig":
        """
        Raises:
            TypeError: unknown or missing fields.
        """
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return TrainConfig(**{**values, "dataset": DatasetInfo(**values["dataset"])})

    def save(self, path: Path) -> None:
        with atomic_write(path, "w") as f:
            json.dump(self.to_json(), f, indent=2)
            f.write("\n")

    @staticmethod
    def load(path: Path) -> "TrainConfig":
        """
        Raises:
            UserError: the file is damaged or of another version.
        """
        try:
            return TrainConfig.from_json(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise UserError(f"{path}: not the options of a training run ({err}): choose another --outdir") from None

    def check_resumable(self, stored: "TrainConfig", outdir: Path) -> None:
        """
        Raises:
            UserError: an option that a running training cannot change differs from the stored one.
        """
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(stored, field.name)
            if field.name in MAY_CHANGE or ours == theirs:
                continue
            if field.name == "dataset":
                before, now = dataclasses.asdict(theirs), dataclasses.asdict(ours)
                name = next(name for name in before if before[name] != now[name])
                change = (
                    "their content differs" if name == "content_hash" else f"{name} was {before[name]}, is {now[name]}"
                )
                raise UserError(
                    f"{outdir} was trained on other data than --data={self.data} ({change}): "
                    f"restore the data or choose another --outdir"
                )
            option = OPTION_NAMES.get(field.name) or "--" + field.name.replace("_", "-")
            raise UserError(
                f"{outdir} was trained with {option}={_show(theirs)}, not {_show(ours)}: "
                f"repeat its options or choose another --outdir"
            )


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_show(v) for v in value) or "none"
    return str(int(value)) if isinstance(value, bool) else str(value)
