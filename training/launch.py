"""Training commands: options -> a configuration, checked against data and machine -> a dry run or the training loop.

Imports what needs torch only when a command runs, so that its help comes at once.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import CommandLine, with_options
from dnnlib.errors import UserError
from dnnlib.files import check_not_input
from training.config.consistency import ConsistencyTraining
from training.config.fields import all_fields, click_options
from training.config.names import unknown_preset
from training.config.training import AUTO, INTERVALS, Preset, TrainConfig

# While there is nothing to save: what is said, and the signals. Ctrl-C then interrupts at once.
UNTIL_TRAINING = ("there is nothing to save yet.", (signal.SIGTERM, signal.SIGUSR1))

if TYPE_CHECKING:
    from training.dataset.images import ImageFolderDataset


FIRST_LOOKS = [
    click.option(
        "--plan",
        help="Print how much memory a run takes, by batch and precision, and exit; needs no GPU, and no --data if they "
        "are as the preset says",
        is_flag=True,
    ),
    click.option(
        "-n",
        "--dry-run",
        help="Print the configuration and exit; with --dry-run=timed also memory, time and cost, by a few steps",
        type=click.Choice(["config", "timed"]),
        is_flag=False,
        flag_value="config",
    ),
]


def training_command(
    config_class: type[TrainConfig], presets: Mapping[str, Preset], default_preset: str, help_text: str
) -> click.Command:
    """The command that trains networks of a family.

    Args:
        config_class: the family's configuration, whose fields are the options.
        presets: its presets by name.
        default_preset: what is trained where no preset is given.
        help_text: what the command does, with examples.
    """

    def list_presets(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            print(preset_table(presets))
            ctx.exit()

    @click.command(
        f"train_{config_class.family}",
        cls=CommandLine,
        help=help_text,
        after_interrupt="repeat the command to continue from the last saved state",
    )
    @click.option(
        "--outdir",
        help="Where to save the run  [required, but for --plan]",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
    )
    @with_options(click_options(config_class, {"preset": default_preset}))
    @click.option("--fp16", help="Published alias: 0 = --precision=fp32  [default: True]", metavar="BOOL", type=bool)
    @click.option(
        "--resume/--no-resume", help="Continue the run in --outdir, or refuse to", default=True, show_default=True
    )
    @click.option(
        "--list-presets",
        help="Print all presets with their sizes, memory, data, length and published results, and exit",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=list_presets,
    )
    @with_options(FIRST_LOOKS)
    def main(outdir: Path | None, resume: bool, plan: bool, dry_run: str | None, **opts: Any) -> None:
        from torch_utils import distributed
        from training.dataset.images import COMPRESSED
        from training.training_loop import training_loop

        if plan:
            distributed.init(opts["timeout"])
            with distributed.fail_together():
                print_plan(config_class, presets, opts, default_preset, outdir)
            distributed.shutdown()
            return
        if outdir is None:
            raise click.UsageError("Missing option '--outdir'.", click.get_current_context())
        with distributed.SuspendSignals(*UNTIL_TRAINING) as suspend:
            distributed.init(opts["timeout"])
            with distributed.fail_together():
                check_not_input("--outdir", outdir, {"--data": opts["data"]})
                config, dataset = make_config(config_class, presets, opts, default_preset, outdir)
                check_shared_out(config)
            if opts["batch_gpu"] == AUTO:
                config = with_fitting_batch(config, dataset)
            for note in config.notes():
                distributed.print0(f"Note: {note}")
            if dataset.compressed:
                distributed.print0(f"Note: --data={config.data.data} is compressed: {COMPRESSED}")
            if dry_run:
                print_dry_run(config, dataset, outdir, resume, timed=dry_run == "timed")
            elif distributed.any_rank(suspend.received):
                distributed.print0("Asked to stop before training began: there is nothing to save")
            else:
                training_loop(config, dataset, outdir, resume)
            distributed.shutdown()

    return main


def print_dry_run(config: TrainConfig, dataset: ImageFolderDataset, outdir: Path, resume: bool, *, timed: bool) -> None:
    """Print what a run would be; with `timed`, what it takes and costs as well."""
    from torch_utils import distributed
    from training.monitoring.outdir import plan_of_run

    with distributed.fail_together():
        print_config(config, outdir, dataset)
        distributed.print0(f"Would {plan_of_run(config, outdir, resume)}")
    if timed:
        from training.planning.preflight import preflight_lines

        for line in preflight_lines(config, dataset):
            distributed.print0(line)
    distributed.print0("Dry run; exiting.")


def print_plan(
    config_class: type[TrainConfig],
    presets: Mapping[str, Preset],
    opts: Mapping[str, Any],
    default_preset: str,
    outdir: Path | None,
) -> None:
    """Print how much memory a run takes; of data, the preset says what they look like where none are given."""
    from torch_utils import distributed
    from torch_utils.device import select_device
    from training.families import spec_of_preset
    from training.planning.memory import spec_of
    from training.planning.report import plan_lines

    device, opts = opts["device"], {**opts, "device": None}  # which need not be here
    if opts["data"] is None:
        config, preset = chosen_config(config_class, presets, opts, default_preset, outdir)
        spec = spec_of_preset(preset, config.data.cond)
    else:
        config, dataset = make_config(config_class, presets, opts, default_preset, outdir)
        spec = spec_of(config, dataset)
    kind = select_device("auto").type if device in (None, "auto") else device
    processes = max(distributed.get_world_size(), config.run.shard)  # which need not be here, either
    for line in plan_lines(config, spec, kind, processes):
        distributed.print0(line)


def with_fitting_batch(config: TrainConfig, dataset: ImageFolderDataset) -> TrainConfig:
    """The configuration with as many images per round as fit into memory; says how many and why.

    Raises:
        UserError: none fits.
    """
    from torch_utils import distributed
    from torch_utils.device import free_memory, select_device
    from training.planning.batch import fitting_batch_gpu
    from training.planning.memory import spec_of

    device = select_device(config.run.device)
    free = distributed.smallest(free_memory(device))
    with distributed.fail_together():
        spec = spec_of(config, dataset)
        batch_gpu, why = fitting_batch_gpu(config, spec, device.type, distributed.get_world_size(), free)
        distributed.print0(why)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, batch_gpu=batch_gpu))


def preset_table(presets: Mapping[str, Preset]) -> str:
    """All presets with the size of their networks, the data that they are for, their length, and published results.

    Memory is that of weights, gradients, optimiser and averages, 4 bytes for each number. That of activations, which
    depends on --batch-gpu and --precision, comes to it.
    """
    import torch

    from training.families import preset_network
    from training.flops import count_parameters
    from training.monitoring.states import kept_bytes

    rows = [
        ("preset", "parameters", "memory without activations", "data", "classes", "images", "batch",
         "takes", "images per second", "published result", "published with")
    ]  # fmt: skip
    for name, preset in presets.items():
        with torch.device("meta"):  # only counted
            parameters = count_parameters(preset_network(preset))
        memory = kept_bytes(preset.config, parameters) / 2**20
        memory = f"{memory:.1f} MiB" if memory < 100 else f"{memory / 2**10:.1f} GiB"
        size = f"{parameters / 1e6:.2f} M"
        run, sampler = preset.config.run, preset.sampler
        length = f"{run.duration / 1e6:.1f}M" if run.duration >= 1e6 else f"{run.duration / 1e3:.0f}k"
        solver = "" if sampler is None else " ".join(sampler.as_options())
        rows.append(
            (name, size, memory, preset.size, str(preset.classes or ""), length, str(run.batch), preset.cost,
             preset.speed, preset.published, solver)
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def make_config(
    config_class: type[TrainConfig],
    presets: Mapping[str, Preset],
    opts: Mapping[str, Any],
    default_preset: str = "",
    outdir: Path | None = None,
) -> tuple[TrainConfig, ImageFolderDataset]:
    """Preset and given options -> a configuration that fits the data and the machine, and the data.

    Args:
        opts: values by the names of options; None = not given.
        default_preset: what is trained where no preset is given, if the data are such as it is meant for.
        outdir: of the run; where it has begun, it keeps its kind of dropout masks and the network that it tunes.

    Raises:
        UserError: an option or the data does not fit; the message names it.
    """
    from training.dataset.images import ImageFolderDataset
    from training.dataset.part import Part
    from training.tuning import check_same_data, with_tuned_network

    config, _ = chosen_config(config_class, presets, opts, default_preset, outdir)
    tuned = None
    if isinstance(config, ConsistencyTraining):
        config, tuned = with_tuned_network(config, outdir)

    data = config.data
    if not data.data:
        raise click.UsageError("Missing option '--data'.", click.get_current_context(silent=True))
    dataset = ImageFolderDataset(
        data.data,
        use_labels=data.cond,
        xflip=data.xflip,
        checksums=data.verify,
        use_captions=data.captions,
        part=Part(data.val_fraction, config.run.seed, held_out=False) if data.val_fraction else None,
    )
    if opts["preset"] is None:
        check_default(dataset, presets, default_preset)
    if data.cache:
        check_memory(dataset, config.data.workers or 0)
    if data.cond and not data.captions and not dataset.has_labels:
        raise UserError(f"--cond=1 needs labels, and {data.data} has none: use --cond=0, or add dataset.json")
    config = dataclasses.replace(config, dataset=dataset.info())
    if tuned is not None:
        check_same_data(config, dataset, tuned)
    dataset.verify()
    return config, dataset


def chosen_config(
    config_class: type[TrainConfig],
    presets: Mapping[str, Preset],
    opts: Mapping[str, Any],
    default_preset: str,
    outdir: Path | None,
) -> tuple[TrainConfig, Preset]:
    """Preset and given options -> a configuration that fits the machine, and the preset; arguments as of `make_config`.

    Raises:
        UserError: an option does not fit.
    """
    from torch_utils.device import select_device

    name = opts["preset"] or default_preset
    if name not in presets:
        raise unknown_preset("--preset", name, presets)
    names = {field.key for field in all_fields(config_class)}
    given = {key: value for key, value in opts.items() if value is not None and key in names}
    given["preset"] = name
    if given.get("batch_gpu") == AUTO:
        given["batch_gpu"] = 0  # until what fits is known
    if opts.get("fp16") is False:
        if given.get("precision", "auto") not in ("auto", "fp32"):
            raise UserError(f"--fp16=0 contradicts --precision={given['precision']}: give one of them")
        given["precision"] = "fp32"
    begun = None if outdir is None else config_class.of_begun(outdir)
    if begun is not None:
        given.setdefault("dropout_masks", begun.run.dropout_masks)
    preset = presets[name].config
    batch = given.get("batch", preset.run.batch)
    check_processes(batch, given.get("batch_gpu", preset.run.batch_gpu))
    config = config_class.from_flat({**rounded_intervals(preset, batch, given), **given}, preset)
    if config.data.workers is None:
        workers = 2 if select_device(config.run.device).type == "cuda" else 0
        config = config_class.from_flat({"workers": workers}, config)
    return config, presets[name]


def check_default(dataset: ImageFolderDataset, presets: Mapping[str, Preset], default: str) -> None:
    """Check that the preset that is trained where none is given is meant for the data.

    Raises:
        UserError: it is not; names those that are, or what the presets are meant for.
    """
    latents = dataset.dtype.kind == "f"
    fitting = [n for n, p in presets.items() if p.fits(dataset.resolution, dataset.num_channels, latents)]
    if default in fitting:
        return
    found = f"{'latents' if latents else 'images'} of {dataset.resolution}x{dataset.resolution}x{dataset.num_channels}"
    advice = f"give one that does: {', '.join(fitting)}"
    if not fitting:
        sizes = sorted({preset.size for preset in presets.values()})
        advice = (
            f"no preset does (they are for {', '.join(sizes)}): convert the data to such a size, or give the --preset "
            "that comes nearest in what it costs (--list-presets) and change what does not suit"
        )
    raise UserError(
        f"--preset is not given, and the default, {default}, is for {presets[default].size}, not for {found} such as "
        f"--data={dataset.path} has: {advice}; python dataset_tool.py check {shlex.quote(str(dataset.path))} "
        f"proposes a whole command"
    )


def rounded_intervals(preset: TrainConfig, batch: int, given: Mapping[str, Any]) -> dict[str, int]:
    """The intervals that come from the preset, each the next multiple of the batch; says which are others now."""
    from torch_utils import distributed

    intervals = {}
    for name in INTERVALS:
        interval = getattr(preset.run, name)
        if name not in given and interval and batch > 0 and interval % batch != 0:
            intervals[name] = -(-interval // batch) * batch
            distributed.print0(f"Note: --{name}={intervals[name]}, the next multiple of --batch={batch}")
    return intervals


def check_memory(dataset: ImageFolderDataset, workers: int) -> None:
    """Check that the decoded images fit into memory, once per process that reads them.

    Raises:
        UserError: they do not.
    """
    import psutil

    from torch_utils import distributed

    copies = max(workers, 1) * distributed.get_world_size()
    needed, available = copies * dataset.decoded_bytes() / 1e9, psutil.virtual_memory().available / 1e9
    if needed > 0.8 * available:
        raise UserError(
            f"--cache needs {needed:.1f} GB in {copies} processes, and {available:.1f} GB are free: "
            f"leave it out, or use fewer --workers"
        )


def check_shared_out(config: TrainConfig) -> None:
    """Check that weights can be shared out as --shard says.

    Raises:
        UserError: they cannot.
    """
    from torch_utils.sharding import check_sharding
    from training.families import trained_by
    from training.holding import sharing_of

    if config.run.shard > 1:
        sharing_of(trained_by(config), config.run.shard)
        check_sharding(config.run.shard)


def check_processes(batch: int, batch_gpu: int) -> None:
    """Check that processes and rounds can share the batch.

    Raises:
        UserError: they cannot.
    """
    from torch_utils import distributed

    processes = distributed.get_world_size()
    batch_gpu = min(batch_gpu or batch, batch // processes)
    if batch > 0 and (batch_gpu == 0 or batch % (processes * batch_gpu) != 0):
        raise UserError(
            f"--batch={batch} is not divisible by processes x --batch-gpu = {processes} x {batch_gpu}: "
            f"change one of them"
        )


def print_config(config: TrainConfig, outdir: Path, dataset: ImageFolderDataset) -> None:
    """Print the configuration, and what it makes of this machine and data."""
    import torch

    from torch_utils import distributed
    from torch_utils.device import select_device
    from training.encoders import encoder_for
    from training.flops import count_parameters
    from training.monitoring.states import disk_needs, kept_bytes
    from training.training_loop import build_network

    encoder = encoder_for(dataset, config.data.encoder, config.data.trust_encoder, distributed.print0)
    with torch.device("meta"):  # only counted
        parameters = count_parameters(build_network(config, dataset, encoder))
    data = config.dataset
    assert data is not None
    for line in dataset.summary():
        distributed.print0(line)
    for key, value in {"outdir": str(outdir), **config.flat()}.items():
        distributed.print0(f"{key + ':':<17s} {json.dumps(value)}")
    distributed.print0(f"Dataset:          {dataset.size_text()}")
    distributed.print0(f"Encoder:          {encoder.describe()}")
    distributed.print0(f"Classes:          {data.label_dim}")
    distributed.print0(f"Network:          {parameters} parameters")
    kept = kept_bytes(config, parameters) / 1e9
    distributed.print0(
        f"Memory:           {kept:.3f} GB, and what the images of a round take (--dry-run=timed, --plan)"
    )
    distributed.print0(f"Disk:             {disk_needs(config, parameters, 0, outdir)}")
    distributed.print0(f"Processes:        {distributed.get_world_size()} on {select_device(config.run.device).type}")
