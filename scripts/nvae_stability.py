"""Short trainings of NVAE from many seeds, at learning rates up to ten times the published one: what NaN they meet.

Prints a line for each run, and one for each rate: runs, steps skipped because their gradients were not finite, runs
that ended early, and the loss at the end (docs/nvae.md).
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import click

from dnnlib.errors import RunError
from train_nvae import main as train

RATES = (0.1, 0.03, 0.01)
BATCH = 64
OPTIONS = ["--preset=digits-nvae", "--num_channels_enc=8", "--num_channels_dec=8", f"--batch={BATCH}", "--device=cpu"]


def short_run(outdir: Path, data: str, rate: float, seed: int, steps: int) -> tuple[list[dict], bool]:
    """The status lines of a training, and whether it came to its end."""
    args = [f"--outdir={outdir}", f"--data={data}", *OPTIONS, f"--lr={rate}", f"--seed={seed}"]
    args += [f"--duration={steps * BATCH}", f"--status={BATCH * 10}", "--snapshot=0", "--checkpoint=0", "--preview=0"]
    alive = True
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            train(args, standalone_mode=False)
        except RunError:
            alive = False
    return [json.loads(line) for line in (outdir / "stats.jsonl").read_text().splitlines()], alive


@click.command()
@click.option("--data", help="Images", default="datasets/digits.zip", show_default=True)
@click.option("--seeds", help="Runs at each rate", default=20, show_default=True)
@click.option("--steps", help="Of each run", default=80, show_default=True)
def main(data: str, seeds: int, steps: int) -> None:
    for rate in RATES:
        skipped, dead, losses = [], 0, []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                lines, alive = short_run(Path(folder) / "run", data, rate, seed, steps)
            skipped.append(sum(line["nonfinite_gradients"] for line in lines))
            dead += not alive
            losses.append(lines[-1]["loss"])
            of_run = {"lr": rate, "seed": seed, "skipped": skipped[-1], "alive": alive, "loss": losses[-1]}
            print(json.dumps(of_run), flush=True)
        figures = {"lr": rate, "runs": seeds, "steps": steps, "skipped": sum(skipped)}
        figures |= {"runs_with_skipped": sum(count > 0 for count in skipped), "dead": dead}
        print(json.dumps({**figures, "losses": [round(min(losses), 1), round(max(losses), 1)]}), flush=True)


if __name__ == "__main__":
    main()
