"""Post-hoc EMA against averages that were tracked: predicted and true errors of the weights, for three families.

Trains each on the digits with many widths tracked, makes all of them of the snapshots of two alone, and compares. The
results are results.json, table.md and phema-science.png in --outdir; repeat an interrupted command to continue.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from dnnlib.files import atomic_write
from training.snapshot.profiles import rounding_errors, true_error
from training.snapshot.reconstruction import StoredAverage, list_averages

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
IMAGES = 65536  # of each run: 512 steps
TIMES = 32  # of snapshots
COUNTS = (4, 8, 16, 32)  # of those that reconstructions have
STORED = (0.050, 0.100)  # widths that they are of
# Tracked besides: narrower, between these, and wider.
OTHERS = (0.010, 0.020, 0.030, 0.040, 0.060, 0.075, 0.090, 0.120, 0.150, 0.200, 0.250)
FAMILIES = {
    "EDM2": ["train_edm2.py", "--preset=digits"],
    "score-SDE": ["train_score_sde.py", "--preset=digits-vp", "--ema-rate=0"],
    "U-ViT": ["train_uvit.py", "--preset=digits-uvit", "--ema-rate=0"],
}


class Error(NamedTuple):
    """Of an average that some snapshots make.

    Args:
        predicted: error of the weights of training times; rounding: what float16 snapshots make of the parameters.
        true: that of the parameters.
        nearest: the same of the stored average that is nearest to the one wanted.
    """

    family: str
    times: int
    std: float
    predicted: float
    rounding: float
    true: float
    nearest: float


def train(family: str, outdir: Path) -> None:
    """Train with all widths tracked, or continue to."""
    script, *options = FAMILIES[family]
    widths = ",".join(f"{std:.3f}" for std in sorted((*STORED, *OTHERS)))
    options += [f"--ema-std={widths}", f"--snapshot={IMAGES // TIMES}", f"--duration={IMAGES}", "--preview=0"]
    command = [sys.executable, ROOT / script, f"--outdir={outdir}", f"--data={ROOT / 'datasets' / 'digits.zip'}"]
    subprocess.run([*command, *options, "--device=cpu"], check=True)


def distance(a: StoredAverage, b: StoredAverage) -> float:
    """That of the parameters of two averages, each as one vector, over the length of the second."""
    squares = [
        ((a.file.get_tensor(name).double() - x).square().sum().item(), x.square().sum().item())
        for name in b.parameters()
        for x in [b.file.get_tensor(name).double()]
    ]
    error, size = np.sum(squares, axis=0)
    return float(error / size) ** 0.5


def measure(family: str, folder: Path) -> list[Error]:
    """The errors of all averages at the end of a run, made of snapshots at so many times."""
    averages = list_averages(folder)
    end = averages[-1].nimg
    wanted = [avg for avg in averages if avg.nimg == end and avg.std in OTHERS]
    stored = [avg for avg in averages if avg.std in STORED]
    errors = []
    for count in COUNTS:
        inputs = [avg for avg in stored if avg.nimg % (end // count) == 0]
        assert len(inputs) == count * len(STORED)
        rounding = rounding_errors(inputs, end, [avg.std for avg in wanted])
        for avg, by_rounding in zip(wanted, rounding, strict=True):
            nearest = min(distance(other, avg) for other in inputs if other.nimg == end)
            predicted, true = true_error(inputs, avg)
            errors.append(Error(family, count, avg.std, predicted, float(by_rounding), true, nearest))
    return errors


def table(errors: Sequence[Error]) -> str:
    """Markdown: a line per width, with errors in percent for each number of snapshots."""
    found = {(e.family, e.times, e.std): e for e in errors}
    families = list(dict.fromkeys(e.family for e in errors))
    counts = " / ".join(map(str, COUNTS))
    head = ["width", "predicted", "rounding", *families]
    lines = [head, ["---"] * len(head), ["", counts, counts, *(f"nearest; {counts}" for _ in families)]]
    for std in OTHERS:
        row = [found[families[0], count, std] for count in COUNTS]
        line = [f"{std:.3f}", " / ".join(f"{100 * e.predicted:.3g}" for e in row)]
        line.append(" / ".join(f"{100 * e.rounding:.2g}" for e in row))
        for family in families:
            some = [found[family, count, std] for count in COUNTS]
            line.append(f"{100 * some[0].nearest:.2g}; " + " / ".join(f"{100 * e.true:.2g}" for e in some))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(path: Path, errors: Sequence[Error]) -> None:
    """True errors against widths, and against predicted errors."""
    families = list(dict.fromkeys(e.family for e in errors))
    colors = dict(zip(COUNTS, plt.get_cmap("viridis")(np.linspace(0.9, 0.1, len(COUNTS))), strict=True))
    fig, axes = plt.subplots(1, len(families) + 1, figsize=(4.6 * (len(families) + 1), 4.2), layout="constrained")
    for place, family in zip(axes, families, strict=False):
        for count, color in colors.items():
            some = [e for e in errors if (e.family, e.times) == (family, count)]
            place.plot([e.std for e in some], [e.true for e in some], marker="o", color=color, label=f"{count} times")
            place.plot([e.std for e in some], [e.rounding for e in some], color=color, linestyle="--", linewidth=1)
        place.plot(
            [e.std for e in some], [e.nearest for e in some], color="gray", linestyle=":", label="nearest stored"
        )
        for std in STORED:
            place.axvline(std, color="black", alpha=0.3, linewidth=1)
        place.plot([], [], color="gray", linestyle="--", linewidth=1, label="rounding to float16 (each)")
        place.set(title=family, xlabel="width (lines: the two that are stored)", yscale="log", xscale="log")
        place.set(ylabel="true error of the weights")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COUNTS) + 2)
    for family, marker in zip(families, "os^", strict=False):
        for count, color in colors.items():
            some = [e for e in errors if (e.family, e.times) == (family, count)]
            label = family if count == COUNTS[0] else None
            xy = [e.predicted for e in some], [e.true for e in some]
            axes[-1].plot(*xy, marker=marker, linestyle="", color=color, label=label)
    axes[-1].set(title="all", xlabel="predicted error of the response", ylabel="true error of the weights")
    axes[-1].set(xscale="log", yscale="log")
    axes[-1].legend(fontsize=8)
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=80)
    plt.close(fig)


def ratios(errors: Sequence[Error]) -> dict[str, tuple[float, float]]:
    """Quartiles of true over predicted errors, of a family, where rounding is less than half of the true ones."""
    families = dict.fromkeys(e.family for e in errors)
    found = {f: [e.true / e.predicted for e in errors if e.family == f and e.rounding < e.true / 2] for f in families}
    return {f: (float(np.quantile(some, 0.25)), float(np.quantile(some, 0.75))) for f, some in found.items()}


@click.command()
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("out/phema-science"), show_default=True)
def main(outdir: Path) -> None:
    """Train, measure, and write the table and the plot."""
    errors = []
    for family in FAMILIES:
        train(family, outdir / family)
        errors += measure(family, outdir / family)
    with atomic_write(outdir / "results.json", "w") as f:
        json.dump([e._asdict() for e in errors], f, indent=1)
    with atomic_write(outdir / "table.md", "w") as f:
        f.write(table(errors) + "\n")
    draw(outdir / "phema-science.png", errors)
    print(table(errors))
    for family, (low, high) in ratios(errors).items():
        print(f"{family}: true / predicted error, quartiles {low:.3f} and {high:.3f}")


if __name__ == "__main__":
    main()
