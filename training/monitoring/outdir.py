"""The directory of a training run: names of its files, and whether a run may continue in it."""

import re
import shlex
from pathlib import Path

from dnnlib.errors import UserError
from dnnlib.files import read_records
from torch_utils import checkpoint, distributed
from torch_utils.sharded_state import load_rest
from training.config.training import OPTIONS_NAME, Preset, RunConfig, TrainConfig
from training.dataset.images import ImageFolderDataset

STATE_PATTERN = r"training-state-(\d+)\.(?:pt|dcp)"  # a file, or a directory of pieces
MEASURED = "fd_pixels,prdc_pixels"  # metrics that need no weights
MEASURED_IMAGES = 1000
SNAPSHOT_PATTERN = r"network-snapshot-.*\.safetensors"


def snapshot_name(nimg: int, suffix: str) -> str:
    """File name of a snapshot; `suffix` names the EMA profile."""
    return f"network-snapshot-{nimg // 1000:07d}{suffix}.safetensors"


def picture_name(nimg: int) -> str:
    """File name of a picture of what is learned."""
    return f"fakes-{nimg // 1000:07d}.png"


def unmeasured(outdir: Path, metric: str, nimg: int) -> set[str]:
    """File names of the snapshots of `nimg` images without a record of a metric."""
    path = outdir / f"metric-{metric}.jsonl"
    records = read_records(path) if path.is_file() else []
    measured = {record.get("net") for record in records if record.get("nimg") == nimg}
    return {path.name for path in outdir.glob(snapshot_name(nimg, "*"))} - measured


def is_owed(outdir: Path, run: RunConfig, nimg: int) -> bool:
    """Whether a run that continues at `nimg` images was ended before it had drawn or measured what it had there."""
    return owes_picture(outdir, run, nimg) or any(unmeasured(outdir, metric, nimg) for metric in run.metrics)


def owes_picture(outdir: Path, run: RunConfig, nimg: int) -> bool:
    """Whether there is no picture of `nimg` images, where there should be one."""
    interval = run.preview_interval
    here = interval > 0 and nimg > 0 and (nimg % interval == 0 or nimg == run.duration)
    return here and not (outdir / picture_name(nimg)).is_file()


def state_name(nimg: int, in_pieces: bool = False) -> str:
    """File name of a training state; `in_pieces` = of the directory of one that several processes write."""
    return f"training-state-{nimg // 1000:07d}.{'dcp' if in_pieces else 'pt'}"


def next_steps(outdir: Path, dataset: ImageFolderDataset, preset: Preset | None) -> list[str]:
    """What to do with the networks of a finished run: commands, a line each.

    Args:
        preset: of the run, whose sampler is used; None = there was none.
    """
    sampler = preset.sampler.as_options() if preset is not None and preset.sampler is not None else []
    net, out = f"--net={outdir}", f"{outdir}-images"
    generate = [net, f"--outdir={out}", "--seeds=0-63", f"--grid={out}.png", *sampler]
    lines = [f"Images: python generate_images.py {shlex.join(generate)}"]
    if dataset.dtype.kind != "f":
        measure = [net, f"--ref={dataset.path}", f"--metrics={MEASURED}", f"--num={MEASURED_IMAGES}", *sampler]
        lines.append(f"Quality: python calculate_metrics.py gen {shlex.join(measure)}")
    return lines


def check_outdir(outdir: Path, config: TrainConfig, resume: bool) -> None:
    """Check that `outdir` holds this run or none.

    Raises:
        UserError: it holds another, or a run although `resume` is False.
    """
    options_path = outdir / OPTIONS_NAME
    results = [path for path in outdir.iterdir() if re.fullmatch(f"{STATE_PATTERN}|{SNAPSHOT_PATTERN}", path.name)]
    if results:  # a run that failed before it had any may start again with other options
        if not resume:
            raise UserError(f"{outdir} already holds a run: choose another --outdir, or continue it with --resume")
        if not options_path.is_file():
            raise UserError(f"{outdir} holds {results[0].name}, but no {options_path.name}: choose another --outdir")
        config.check_resumable(type(config).load(options_path), outdir)


def plan_of_run(config: TrainConfig, outdir: Path, resume: bool) -> str:
    """What a training command would do first: 'start at 0 images', 'resume at 1024 images', ...

    Raises:
        UserError: as `check_outdir`.
    """
    found: list[int] = []
    if outdir.is_dir():
        check_outdir(outdir, config, resume)
        checkpoint.restore_newest_state(
            outdir,
            STATE_PATTERN,
            lambda state: found.append(state["nimg"]),
            distributed.print0,
            lambda path: load_rest(path) if path.is_dir() else checkpoint.load_state(path),
        )
    nimg = found[0] if found else 0
    if nimg >= config.run.duration and not is_owed(outdir, config.run, nimg):
        return f"do nothing: {outdir} has its {nimg} images"
    return f"{'resume' if found else 'start'} at {nimg} images"
