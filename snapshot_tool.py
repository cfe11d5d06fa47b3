"""Convert, inspect, export and fetch network snapshots: `python snapshot_tool.py`."""

import functools
import json
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from dnnlib.cli import CommandGroup, offline_option
from dnnlib.download import is_url, open_url
from dnnlib.errors import UserError, one_line
from torch_utils import safe_pickle
from training.config.edm2 import files_for
from training.flops import count_parameters
from training.metrics.files import ENTRIES, load_stats, published_stats
from training.preconditioning import PRECISIONS
from training.snapshot.files import (
    WRITERS,
    SnapshotFile,
    build_for,
    check_suffix,
    finite_tensor,
    open_snapshot,
    weights_dtype,
    write_snapshot,
)
from training.snapshot.hub import export_folder

MEASURED = {"file", "bytes", "parameters", "tensors", "dtype"}  # what `inspect` finds out itself
dtype_option = click.option(
    "--dtype", help="Type of the weights  [default: as they are]", type=click.Choice(list(PRECISIONS))
)


@click.group(cls=CommandGroup)
def main() -> None:
    """Convert, inspect, export and fetch network snapshots.

    SNAPSHOT is a file (.safetensors, .pkl), a Hugging Face folder, or a URL (http, https, file, hf://owner/repo[/file]).
    """


@main.command()
@click.argument("source", metavar="SNAPSHOT")
@click.argument("dest", metavar="DEST", type=click.Path(path_type=Path))
@dtype_option
@click.option(
    "--format",
    "suffix",
    help="Format of the files of a directory",
    type=click.Choice(["safetensors", "pkl"]),
    default="safetensors",
    show_default=True,
)
@click.option("--skip", help="Skip results that are there", is_flag=True)
@offline_option
def convert(source: str, dest: Path, dtype: str | None, suffix: str, skip: bool) -> None:
    """Convert native snapshots (.safetensors) to pickles that the published tools read (.pkl), or back.

    Of a single snapshot, the suffix of DEST chooses the format. If SNAPSHOT is a directory, all snapshots in it are
    converted, and DEST is a directory.

    \b
    Examples:
      python snapshot_tool.py convert edm2-img512-s-2147483-0.130.pkl edm2-s.safetensors
      python snapshot_tool.py convert raw-snapshots/ native/
    """
    if not is_url(source) and not Path(source).exists():
        raise UserError(f"{source}: no such file or directory")
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        targets = plan_directory(Path(source), dest, f".{suffix}")
    else:
        check_suffix(dest)
        if dest.exists() and Path(source).exists() and dest.samefile(source):
            raise UserError(f"{dest}: is what is converted: choose another name for the result")
        targets = {source: dest}
    if not targets:
        print("Nothing to convert.")
    for path, target in tqdm(
        targets.items(), unit="file", disable=None if len(targets) > 1 else True, dynamic_ncols=True
    ):
        if not (skip and target.is_file()):
            file = open_snapshot(path)
            net, _ = build_for(file)
            get_tensor = functools.partial(finite_tensor, file)
            write_snapshot(target, net, get_tensor, chosen_dtype(file, net, dtype), file.metadata)
            tqdm.write(str(target))


def plan_directory(source: Path, dest: Path, suffix: str) -> dict[str, Path]:
    """Which file becomes which."""
    files = sorted(path for path in source.iterdir() if path.suffix in WRITERS)
    if not files:
        raise UserError(f"{source}: no {' or '.join(WRITERS)} files in this directory")
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest}: a directory is converted into a directory, and this is a file")
    targets: dict[str, Path] = {}
    for path in files:
        target = dest / (path.stem + suffix)
        if target in files:
            continue  # converted already, or of this format from the beginning
        if target in targets.values():
            raise UserError(f"{path}: another file of that name in {source} would become {target}, too")
        targets[str(path)] = target
    return targets


def chosen_dtype(file: SnapshotFile, net: torch.nn.Module, dtype: str | None) -> torch.dtype:
    """The type asked for, or that of the weights in the file."""
    return PRECISIONS[dtype] if dtype is not None else weights_dtype(file, net)


@main.command()
@click.argument("source", metavar="SNAPSHOT")
@click.option("--json", "as_json", help="Print JSON", is_flag=True)
@offline_option
def inspect(source: str, as_json: bool) -> None:
    """Print what a snapshot holds: architecture, sizes, EMA profile, provenance. Reference statistics work, too."""
    facts = facts_of_statistics(source) or facts_of_network(source)
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        plainly = isinstance(value, str) and value.isprintable()
        print(f"{one_line(key) + ':':20s}{value if plainly else json.dumps(value)}")


def facts_of_network(source: str) -> dict[str, Any]:
    file = open_snapshot(source)
    net, _ = build_for(file)
    return {
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "parameters": count_parameters(net),
        "tensors": len(file.names),
        "dtype": str(weights_dtype(file, net)).removeprefix("torch."),
    } | {key: value for key, value in file.metadata.items() if key not in MEASURED}


def facts_of_statistics(source: str) -> dict[str, Any] | None:
    """None if the file is something else."""
    if Path(source).is_dir() or not source.partition("#")[0].endswith((".pkl", ".npz")):
        return None
    path = Path(open_url(source, return_filename=True))
    if path.suffix == ".pkl" and not ENTRIES.keys() & published_stats(safe_pickle.load(path), str(path)).keys():
        return None
    stats = load_stats(path)
    features = {name: f"mean and covariance of {len(stats[name].mu)} features" for name in ENTRIES if name in stats}
    return {"file": str(path), "bytes": path.stat().st_size, **features}


@main.command()
@click.argument("source", metavar="SNAPSHOT")
@click.argument("dest", metavar="DEST", type=click.Path(path_type=Path))
@click.option(
    "--license",
    "license_id",
    help="Licence of the weights, such as mit; known for NVIDIA's published networks",
    metavar="ID",
)
@dtype_option
@offline_option
def export(source: str, dest: Path, license_id: str | None, dtype: str | None) -> None:
    """Write a folder for the Hugging Face hub: config.json, model.safetensors and a model card.

    What loads a snapshot loads the folder, too, and hf://owner/repo when it has been uploaded.
    """
    file = open_snapshot(source)
    export_folder(file, dest, license_id, PRECISIONS.get(dtype or ""))
    print(dest)


@main.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@offline_option
def prefetch(names: tuple[str, ...]) -> None:
    """Fetch what is needed later without a network, and print where it is kept.

    NAME is a preset of generate_images.py, a metric (fid, fd_dinov2), or a URL.
    """
    for name in names:
        for url in [name] if is_url(name) else files_for(name):
            print(open_url(url, return_filename=True))


if __name__ == "__main__":
    main()
