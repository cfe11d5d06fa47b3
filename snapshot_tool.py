"""Convert, inspect, export and fetch network snapshots: `python snapshot_tool.py`."""

import json
from pathlib import Path

import click

from dnnlib.cli import CommandGroup, offline_option
from dnnlib.download import is_url, open_url
from dnnlib.errors import one_line
from dnnlib.progress import Progress
from training.config.edm2 import files_for
from training.config.metrics import PRECISIONS

# Suffixes of the files that the published tools of a family read; or a suffix names itself.
PUBLISHED_FORMATS = {"edm2": "pkl", "score_sde": "pth", "uvit": "pth", "nvae": "pt"}

dtype_option = click.option(
    "--dtype", help="Type of the weights  [default: as they are]", type=click.Choice(PRECISIONS)
)

arch_option = click.option(
    "--arch",
    help="Training preset that names the architecture of published files that do not say it",
    metavar="PRESET",
)


@click.group(cls=CommandGroup)
def main() -> None:
    """Convert, inspect, export and fetch network snapshots.

    SNAPSHOT is a file (.safetensors, .pkl; .pth of score_sde and U-ViT), a folder of Hugging Face or U-ViT (.ckpt), or
    a URL (http, https, file, hf://owner/repo[/file]).
    """


@main.command(after_interrupt="repeat the command with --skip to convert what is missing")
@click.argument("source", metavar="SNAPSHOT")
@click.argument("dest", metavar="DEST", type=click.Path(path_type=Path))
@dtype_option
@click.option(
    "--format",
    "layout",
    help="What to write: files of a suffix, or those of a family's published tools  [default: as DEST says; "
    "safetensors in directories]",
    type=click.Choice(["safetensors", *dict.fromkeys(PUBLISHED_FORMATS.values()), *PUBLISHED_FORMATS]),
)
@click.option("--skip", help="Skip results that are there", is_flag=True)
@arch_option
@offline_option
def convert(source: str, dest: Path, dtype: str | None, layout: str | None, skip: bool, arch: str | None) -> None:
    """Convert native snapshots (.safetensors) to files that the published tools read (.pkl, .pth, .pt), or back.

    Of a single snapshot, the suffix of DEST says what is written. If SNAPSHOT is a directory, all snapshots in it are
    converted, and DEST is a directory.

    \b
    Examples:
      python snapshot_tool.py convert edm2-img512-s-2147483-0.130.pkl edm2-s.safetensors
      python snapshot_tool.py convert raw-snapshots/ native/
      python snapshot_tool.py convert imagenet256_uvit_huge.pth uvit.safetensors
      python snapshot_tool.py convert checkpoint_24.pth ve.safetensors --arch=ve/cifar10_ncsnpp_continuous
      python snapshot_tool.py convert out/ve checkpoints --format=score_sde
    """
    from training.preconditioning import PRECISIONS
    from training.snapshot.conversion import convert_snapshot, plan_conversion

    suffix = layout and f".{PUBLISHED_FORMATS.get(layout, layout)}"
    family = layout if layout in PUBLISHED_FORMATS else None
    targets = plan_conversion(source, dest, suffix)
    if not targets:
        print("Nothing to convert.")
    progress = Progress(targets.items(), unit="file", hidden=len(targets) == 1)
    for path, target in progress:
        if not (skip and target.is_file()):
            convert_snapshot(path, target, PRECISIONS.get(dtype or ""), arch, family)
            progress.write(str(target))


@main.command()
@click.argument("source", metavar="SNAPSHOT")
@click.option("--json", "as_json", help="Print JSON", is_flag=True)
@arch_option
@offline_option
def inspect(source: str, as_json: bool, arch: str | None) -> None:
    """Print what a snapshot holds: architecture, sizes, EMA profile, provenance. Reference statistics work, too."""
    from training.snapshot.inspection import facts_of

    facts = facts_of(source, arch)
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        plainly = isinstance(value, str) and value.isprintable()
        print(f"{one_line(key) + ':':20s}{value if plainly else json.dumps(value)}")


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
@arch_option
@offline_option
def export(source: str, dest: Path, license_id: str | None, dtype: str | None, arch: str | None) -> None:
    """Write a folder for the Hugging Face hub: config.json, model.safetensors and a model card.

    What loads a snapshot loads the folder, too, and hf://owner/repo when it has been uploaded.
    """
    from training.preconditioning import PRECISIONS
    from training.snapshot import open_snapshot
    from training.snapshot.hub import export_folder

    file = open_snapshot(source, preset=arch)
    export_folder(file, dest, license_id, PRECISIONS.get(dtype or ""))
    vae = file.description.build_encoder(source).vae_name
    if Path(vae).is_absolute():
        print(f"Note: images are decoded with the VAE {vae}, which others need, too: say on the model card where it is")
    print(dest)


@main.command(after_interrupt="repeat the command to continue")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@offline_option
def prefetch(names: tuple[str, ...]) -> None:
    """Fetch what is needed later without a network, and print where it is kept.

    NAME is a preset of generate_images.py, a metric (fid, cmmd), a model (stabilityai/sd-vae-ft-mse,
    openai/clip-vit-large-patch14), or a URL.
    """
    for name in names:
        for url in [name] if is_url(name) else files_for(name):
            print(open_url(url, return_filename=True))


if __name__ == "__main__":
    main()
