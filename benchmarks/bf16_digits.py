"""Digits trained in bfloat16 and in float32 with several seeds: losses, and distances of samples to the dataset."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

FOLDER = Path("out/benchmark/bf16")
SEEDS = (0, 1, 2)
NUM = 2000


def run(*args: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, args)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    data, ref = "--data=datasets/digits.zip", FOLDER / "ref.safetensors"
    run("calculate_metrics.py", "ref", data, f"--dest={ref}", "--metrics=fd_pixels")
    for precision in ("fp32", "bf16"):
        losses, distances = [], []
        for seed in SEEDS:
            outdir = FOLDER / f"{precision}-{seed}"
            options = [f"--outdir={outdir}", data, "--preset=digits", f"--seed={seed}", f"--precision={precision}"]
            run("train_edm2.py", *options)
            lines = [json.loads(line) for line in (outdir / "stats.jsonl").read_text().splitlines()]
            losses.append(statistics.mean(line["loss"] for line in lines[-8:]))
            net = sorted(outdir.glob("network-snapshot-*-0.100.safetensors"))[-1]
            options = [f"--net={net}", f"--ref={ref}", "--metrics=fd_pixels", f"--num={NUM}", "--precision=fp32"]
            run("calculate_metrics.py", "gen", *options, f"--outdir={outdir}")
            result = json.loads((outdir / "metric-fd_pixels.jsonl").read_text().splitlines()[-1])
            distances.append(result["results"]["fd_pixels"])
        for name, values in [("loss", losses), ("fd_pixels", distances)]:
            print(precision, name, *(f"{x:.4f}" for x in values), flush=True)


if __name__ == "__main__":
    main()
