"""Commands that suit a dataset."""

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib.cli import parse_nimg
from dnnlib.errors import OUT_OF_MEMORY, UserError
from dnnlib.progress import format_time
from training.advice.families import FAMILIES, Choice, Data, nearest_preset
from training.config.advice import MACHINES, AdviceConfig
from training.config.fields import Field, all_fields, show
from training.config.training import Ki, Mi, Preset, TrainConfig
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many
from training.encoders import encoder_for
from training.flops import count_parameters
from training.launch import make_config
from training.planning.timing import images_per_second
from training.training_loop import build_network

MAX_PASSES = 2000  # over the images; published trainings make 1700 (EDM2) to 4000 (EDM on CIFAR-10)


@dataclass(frozen=True)
class Proposal:
    """A command that trains on a dataset.

    Args:
        family: name of its family.
        outdir, data: where the run goes, and the dataset.
        choices: its other options.
        processes: of torchrun; 1 = without it.
        here: whether it is for this machine.
        config, dataset: what the command trains.
    """

    family: str
    outdir: str
    data: str
    choices: list[Choice]
    processes: int
    here: bool
    config: TrainConfig
    dataset: ImageFolderDataset

    def options(self) -> list[str]:
        """Of the command, in order."""
        fields = {field.key: field for field in all_fields(type(self.config))}
        chosen = [f"{fields[c.key].flag}={_shown(fields[c.key], c.value)}" for c in self.choices]
        return [f"--outdir={self.outdir}", f"--data={self.data}", *chosen]

    def command(self) -> str:
        """As it is typed."""
        start = "python" if self.processes == 1 else f"torchrun --standalone --nproc_per_node={self.processes}"
        return f"{start} train_{self.family}.py {shlex.join(self.options())}"

    def reasons(self) -> dict[str, str]:
        """By option."""
        script = {f"train_{self.family}.py": FAMILIES[self.family].what}
        chosen = zip(self.options()[2:], self.choices, strict=True)
        return script | {option: choice.reason for option, choice in chosen}


@dataclass(frozen=True)
class Advice:
    """What a dataset's user may do next.

    Args:
        proposal: a command that trains on it; None = there is none.
        seconds: how long it takes here; None = not known.
        text: the same in words, or why there is no command.
    """

    proposal: Proposal | None
    seconds: float | None
    text: str

    def lines(self) -> list[str]:
        """For users."""
        if self.proposal is None:
            return ["", self.text]
        reasons = self.proposal.reasons()
        width = max(map(len, reasons)) + 2
        others = ", ".join(name for name in FAMILIES if name != self.proposal.family)
        return [
            "",
            "To train on it:",
            "",
            self.proposal.command(),
            "",
            *(f"  {option.ljust(width)}{reason}" for option, reason in reasons.items()),
            "",
            f"Time: {self.text}",
            f"Other models: --family={others}; for another machine: --machine={', '.join(MACHINES)}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        proposal = self.proposal
        command = {} if proposal is None else {"command": proposal.command(), "because": proposal.reasons()}
        return {**command, "seconds": self.seconds, "note": self.text}


def advice_on(data: str, facts: Mapping[str, Any], wanted: AdviceConfig) -> Advice:
    """What to do with a dataset.

    Args:
        data: folder or ZIP file.
        facts: what `training.conversion.check.check_dataset` found out about it.
        wanted: what the command is to be like.
    """
    noise = (facts["suggested_P_mean"], facts["suggested_P_std"], facts["suggestion_because"])
    try:
        proposal = propose(data, noise, wanted)
    except UserError as err:
        return Advice(None, None, str(err))
    return Advice(proposal, *(estimate(proposal) if wanted.timing else (None, "not timed, as --timing=0 asks for")))


def propose(data: str, noise: tuple[float, float, str], config: AdviceConfig) -> Proposal:
    """The command that suits a dataset.

    Args:
        data: folder or ZIP file.
        noise: P_mean and P_std that suit it, and why.
        config: what the command is to be like.

    Raises:
        UserError: the family has no networks for such data; says why.
    """
    family = config.family
    captions = family == "uvit" and _has_captions(data)
    dataset = ImageFolderDataset(data, use_labels=not captions, use_captions=captions)
    names, wanted = list(MACHINES), config.machine or this_machine()
    fitting = [name for name in names[: names.index(wanted) + 1] if len(dataset) >= MACHINES[name]]
    chosen, entry = Data(dataset, *noise, machine=fitting[-1]), FAMILIES[family]
    name = nearest_preset(chosen, entry)
    preset = entry.presets[name]
    choices = [*entry.choose(chosen, preset), *_length(chosen, preset.config, config.duration)]
    options = {"preset": name, "data": data, **{choice.key: choice.value for choice in choices}}
    try:
        training, dataset = make_config(entry.config, entry.presets, options)
        choices.insert(0, Choice("preset", name, _why_preset(chosen, preset, wanted, _parameters(training, dataset))))
    except UserError as err:
        raise UserError(f"--family={family}: no command for {data}: {err}") from None
    outdir = f"out/{Path(os.path.normpath(data)).name.removesuffix('.zip')}-{family}"
    here = wanted == this_machine()
    return Proposal(family, outdir, data, choices, processes_for(chosen.machine), here, training, dataset)


def this_machine() -> str:
    """Its name in MACHINES."""
    return list(MACHINES)[min(torch.cuda.device_count(), 2)]


def processes_for(machine: str) -> int:
    """How many share the batch, a power of two: as many GPUs as are here, or eight."""
    gpus = torch.cuda.device_count() or 8
    return 1 << int(math.log2(gpus)) if machine == "8gpus" else 1


def estimate(proposal: Proposal) -> tuple[float | None, str]:
    """Seconds that a proposal takes here, or None, and that in words."""
    if not proposal.here:
        return None, "not timed, since it is for another machine"
    try:
        speed, steps, size = images_per_second(proposal.config, proposal.dataset)
    except torch.OutOfMemoryError:
        return None, f"not timed: {OUT_OF_MEMORY}"
    seconds = proposal.config.run.duration / speed / proposal.processes
    shared = f", shared by {proposal.processes} GPUs" if proposal.processes > 1 else ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    others = f"; other programs keep the machine busy (load {load:.1f}, {many(cores, 'core')})"
    busy = others if load > cores + 1 else ""
    return seconds, (
        f"about {format_time(seconds)} here, without previews: {speed:.4g} images per second in {steps} timed steps of "
        f"{many(size, 'image')}{shared}{busy}"
    )


def _shown(field: Field, value: Any) -> str:
    """The value of an option as it is typed, numbers of images in Mi or Ki where they are round."""
    if field.option.parse is parse_nimg and value:
        for unit, suffix in [(Mi, "Mi"), (Ki, "Ki")]:
            if value % unit == 0:
                return f"{value // unit}{suffix}"
    return show(value)


def _has_captions(data: str) -> bool:
    try:
        ImageFolderDataset(data, use_captions=True)
    except UserError:
        return False
    return True


def _parameters(config: TrainConfig, dataset: ImageFolderDataset) -> str:
    with torch.device("meta"):  # only counted
        net = build_network(config, dataset, encoder_for(dataset))
    return f"{count_parameters(net) / 1e6:.3g} million parameters"


def _why_preset(data: Data, preset: Preset, wanted: str, parameters: str) -> str:
    nearest = "" if data.resolution == preset.resolution else f", the nearest to {data.resolution}x{data.resolution}"
    reasons = [f"for {preset.size}{nearest}", preset.cost, parameters]
    if wanted != data.machine:
        names = list(MACHINES)
        least = MACHINES[names[names.index(data.machine) + 1]]
        reasons.append(f"fewer than {least} images are soon learned by heart by larger ones")
    return ", ".join(filter(None, reasons))


def _length(data: Data, config: TrainConfig, asked: int | None) -> list[Choice]:
    """Batch and duration, and what follows from it."""
    run, images = config.run, len(data.dataset)
    most = -(-MAX_PASSES * images // run.batch) * run.batch
    duration = min(run.duration, most) if asked is None else asked
    batch = Choice("batch", run.batch, f"of the preset: {-(-duration // run.batch)} steps")
    passes = f"{duration / images:.4g} passes over {many(images, 'image')}"
    if duration == run.duration:
        return [batch, Choice("duration", duration, f"of the preset: {passes}")]
    why = f"{passes}, as asked for" if asked else f"{passes}; the preset's {run.duration} images would be more still"
    choices = [batch, Choice("duration", duration, why)]
    optimizer = config.optimizer.to_json()
    for key in (key for key in ("decay", "decay_from", "decay_to") if optimizer.get(key)):
        scaled = type(optimizer[key])(optimizer[key] * duration / run.duration)
        choices.append(Choice(key, scaled, "in proportion to the duration"))
    if optimizer.get("warmup", 0) > duration // 10:
        choices.append(Choice("warmup", duration // 10, "a tenth of the duration at most"))
    if rate := getattr(config.ema, "ema_rate", 0):
        scaled = max(1 - (1 - rate) * run.duration / duration, 0)
        choices.append(Choice("ema_rate", round(scaled, 6), "an average over as large a part of the training"))
    return choices
