"""Reconstruct EMA profiles of any width after training."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dnnlib.cli import CommandLine, imported_when_used, parse_bytes, parsed_by
from dnnlib.errors import UserError
from training.config.ema import parse_std_list

if TYPE_CHECKING:
    from training.release import list_input_pickles, pkl_path, reconstruct_phema

__all__ = ["list_input_pickles", "pkl_path", "reconstruct_phema"]  # for Python callers
__getattr__ = imported_when_used(dict.fromkeys(__all__, "training.release"))


@click.command(
    cls=CommandLine,
    after_interrupt="the saved results are complete; repeat the command with --skip to make the others",
)
@click.option(
    "--indir",
    help="Directory with the snapshots of a run, or with plain state dicts of any module: NAME-KIMG-WIDTH.pt, .pth or "
    ".safetensors",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
)
@click.option("--inprefix", help="Start of the snapshots' names  [default: any]", metavar="STR")
@click.option(
    "--instd", help="Widths of the snapshots to use  [default: all]", metavar="LIST", callback=parsed_by(parse_std_list)
)
@click.option(
    "--outdir",
    help="Where to save the results  [default: --indir]",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option("--outprefix", help="Start of the results' names", metavar="STR", default="phema", show_default=True)
@click.option(
    "--outstd",
    help="Widths to make, such as 0.05,0.07 or 0.010,0.015,...,0.250",
    metavar="LIST",
    callback=parsed_by(parse_std_list),
    required=True,
)
@click.option(
    "--outkimg",
    help="Training time of the results in kimg, that of a snapshot  [default: the latest]",
    metavar="INT",
    type=int,
)
@click.option("--skip", help="Skip results that are there", is_flag=True)
@click.option(
    "--batch",
    help="Results made in one pass over the snapshots",
    metavar="INT",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
)
@click.option(
    "--format",
    "suffix",
    help="What to write: pkl is for the published tools, pt and pth are plain state dicts  [default: as the snapshots]",
    type=click.Choice(["safetensors", "pkl", "pt", "pth"]),
    callback=lambda _ctx, _param, value: value and f".{value}",
)
@click.option(
    "--memory",
    help="Most memory that values may take, such as 500MB or 2GiB, beside the 0.3 GB of the program itself  [default: "
    "what is fastest]",
    metavar="SIZE",
    callback=parsed_by(parse_bytes),
)
@click.option(
    "--latest",
    help="What plain state dicts take from the latest snapshot in place of a sum, by patterns of names  [default: "
    "*running_mean,*running_var]",
    metavar="LIST",
    callback=parsed_by(lambda text: [part.strip() for part in text.split(",") if part.strip()]),
)
@click.option(
    "--plot",
    help="Draw which weight each training time has in the results, wanted and reconstructed",
    metavar="FILE.png",
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.option(
    "--verify",
    help="Also remake each average that is stored for the time of the results from the other snapshots, and print the "
    "true error beside the expected one",
    is_flag=True,
)
def main(
    indir: Path,
    inprefix: str | None,
    instd: list[float] | None,
    outdir: Path | None,
    outprefix: str,
    outstd: list[float],
    outkimg: int | None,
    skip: bool,
    batch: int,
    suffix: str | None,
    memory: int | None,
    latest: list[str] | None,
    plot: Path | None,
    verify: bool,
) -> None:
    """Combine the snapshots of a run into EMA profiles of other widths (post-hoc EMA).

    \b
    Examples:
      python reconstruct_phema.py --indir=out/digits --outstd=0.010,0.020,...,0.200
      # State dicts of another project, net-0000100-0.050.pt and so on
      python reconstruct_phema.py --indir=mine --inprefix=net --outstd=0.150 --memory=2GiB
    """
    from training.snapshot.profiles import describe_errors, draw_responses, true_errors
    from training.snapshot.reconstruction import inputs_until, list_averages, reconstruct_phema

    inputs = list_averages(indir, inprefix, instd)
    outdir = outdir or indir
    beside = outdir.resolve() == indir.resolve()
    if beside and any(avg.path.name.startswith(f"{outprefix}-") for avg in inputs):
        raise UserError(f"--outprefix={outprefix}: results in --indir need another prefix than the snapshots there")
    used, out_nimg = inputs_until(inputs, outkimg)
    for line in describe_errors(used, out_nimg, outstd):
        print(line)
    if plot is not None:
        draw_responses(plot, used, out_nimg, outstd)
        print(f"Picture: {plot}")
    if verify:
        for std, expected, true in true_errors(used, out_nimg):
            print(f"Width {std:.3f} from the others: expected error {expected:.1%}, true {true:.1%}")
    there = set(outdir.glob("*")) if skip else set()
    for path in reconstruct_phema(
        inputs, outdir, outprefix, outstd, outkimg, skip, batch, suffix, memory, latest, log=print
    ):
        print(f"{path} (skipped: it is there)" if path in there else path)


if __name__ == "__main__":
    main()
