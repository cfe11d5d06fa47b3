"""What is known of an image that is restored, and by which method. One home of the defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.cli import parse_int_list
from dnnlib.errors import UserError
from training.config.fields import REQUIRED, Config, all_fields, option

TASKS = ("super-resolution", "deblur", "mask")
METHODS = ("pigdm", "diffpir", "dps")
BLURS = {"gaussian": 1.0, "box": 3.0, "motion": 5.0}  # with their widths
# Options that one task or method alone looks at.
OF_TASKS = {"factor": "super-resolution", "blur": "deblur", "blur_width": "deblur", "blur_angle": "deblur"}
OF_TASKS |= {"mask": "mask", "box": "mask", "ratio": "mask"}
OF_METHODS = {"prior_std": "pigdm", "diffpir_weight": "diffpir", "dps_step": "dps"}


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Config):
    """Which pixels are known; one of them is given."""

    mask: str | None = option(None, "A picture: white is kept, black is filled in", metavar="FILE")
    box: tuple[int, ...] | None = option(
        None,
        "Fill in this box of pixels",
        parse=lambda text: tuple(parse_int_list(text)),
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        low=0,
    )
    ratio: float | None = option(None, "Fill in that share of all pixels, here and there", above=0, high=1)

    @classmethod
    def take(cls, opts: dict[str, Any]) -> "MaskConfig":
        """Take these options out of all those of a command."""
        return cls.from_flat({field.key: opts.pop(field.key) for field in all_fields(cls)})

    def check(self) -> None:
        """Refuse anything but one mask.

        Raises:
            UserError: none or several are given, or a box is no box.
        """
        if [self.mask, self.box, self.ratio].count(None) != 2:
            raise UserError("what is to be filled in? Give one of --mask, --box and --ratio")
        if self.box is not None and len(self.box) != 4:
            raise UserError(f"--box: four numbers LEFT,TOP,RIGHT,BOTTOM, not {len(self.box)}")

    @property
    def path(self) -> Path | None:
        """The picture."""
        return None if self.mask is None else Path(self.mask)


@dataclass(frozen=True, kw_only=True)
class RestorationConfig(Config):
    """A task, which is how images are damaged before they are restored, and a method."""

    task: str | None = option(None, "What is undone", choices=TASKS, default_text=REQUIRED)
    degraded: bool = option(
        False, "The images of --data are damaged already; otherwise, they are damaged before they are restored"
    )
    method: str = option(
        METHODS[0],
        "How the network learns of the damaged image: PiGDM and DPS differentiate it, which takes about twice as "
        "long, and DPS wants 100 steps or more; DiffPIR does not",
        choices=METHODS,
    )
    noise: float = option(
        0.05,
        "Standard deviation of the noise in damaged images, as a share of the range from black to white",
        low=0,
        high=10,
    )
    factor: int = option(2, "Super-resolution: pixels of which the mean is known, each way", low=2, high=64)
    blur: str = option("gaussian", "Deblurring: kind of blur; beyond their edges, images repeat", choices=tuple(BLURS))
    blur_width: float | None = option(
        None,
        "Standard deviation of a Gaussian blur, width of a box or length of a motion, in pixels",
        above=0,
        high=1000,
        default_text=", ".join(f"{width:g} ({blur})" for blur, width in BLURS.items()),
    )
    blur_angle: float = option(
        0.0, "Direction of a motion in degrees, counterclockwise from the horizontal", low=-360, high=360
    )
    masks: MaskConfig = MaskConfig()
    prior_std: float = option(
        0.25,
        "PiGDM: standard deviation of clean pixels, by which it knows how sure the network is, as a share of the range "
        "from black to white",
        above=0,
        high=10,
    )
    diffpir_weight: float = option(
        1.0, "DiffPIR's lambda, its trust in the network over the damaged image", above=0, high=1e6
    )
    dps_step: float = option(3.0, "DPS's zeta, how far its steps may go", above=0, high=1e6)

    @classmethod
    def take(cls, opts: dict[str, Any]) -> "RestorationConfig":
        """Take these options out of all those of a command, where None = not given.

        Raises:
            UserError: they do not go together.
        """
        taken = {field.key: opts.pop(field.key) for field in all_fields(cls)}
        given = {name: value for name, value in taken.items() if value is not None}
        config = cls.from_flat(given)
        if config.task is None:
            raise UserError(f"what is to be undone? Give --task={'|'.join(TASKS)}")
        for kind, owners, chosen in (("task", OF_TASKS, config.task), ("method", OF_METHODS, config.method)):
            for name in given:
                if owners.get(name, chosen) != chosen:
                    raise UserError(f"--{name.replace('_', '-')} has no effect with --{kind}={chosen}: leave it out")
        if config.task == "mask":
            config.masks.check()
        if config.degraded and config.masks.ratio is not None:
            raise UserError("--ratio chooses the pixels that it hides: with --degraded=1, give --mask or --box")
        if "blur_angle" in given and config.blur != "motion":
            raise UserError("--blur-angle has no effect without --blur=motion: leave it out")
        if config.blur != "gaussian" and not config.width.is_integer():
            raise UserError(f"--blur-width={config.width:g}: a {config.blur} is a whole number of pixels wide")
        return config

    @property
    def width(self) -> float:
        """Of the blur."""
        return BLURS[self.blur] if self.blur_width is None else self.blur_width

    def used(self) -> dict[str, Any]:
        """The options that the task and the method look at, by name; those of a mask that are not given are None."""
        chosen = {**dict.fromkeys(OF_TASKS.values()), **dict.fromkeys(OF_METHODS.values())}
        chosen |= {self.task: True, self.method: True}
        owners = {**OF_TASKS, **OF_METHODS}
        values = {name: value for name, value in self.flat().items() if chosen.get(owners.get(name), True)}
        if self.task == "deblur":
            values["blur_width"] = self.width
            if self.blur != "motion":
                del values["blur_angle"]
        return values

    @property
    def shrinks(self) -> int:
        """By which factor damaged images are smaller."""
        return self.factor if self.task == "super-resolution" else 1

    def describe(self) -> str:
        """What is done, in words for users."""
        width, box = f"{self.width:g}", f"{self.factor}x{self.factor}"
        blurred = {
            "gaussian": f"a Gaussian blur with a standard deviation of {width} pixels",
            "box": f"means over a box of {width}x{width} pixels",
            "motion": f"motion over {width} pixels at {self.blur_angle:g} degrees",
        }
        known = {"super-resolution": f"means of {box} pixels", "deblur": blurred[self.blur], "mask": "some pixels"}
        how = {
            "pigdm": f"PiGDM (prior std {self.prior_std:g})",
            "diffpir": f"DiffPIR (lambda {self.diffpir_weight:g})",
            "dps": f"DPS (zeta {self.dps_step:g})",
        }
        return f"{known[self.task or TASKS[0]]}, with noise {self.noise:g} of the range of pixels; {how[self.method]}"
