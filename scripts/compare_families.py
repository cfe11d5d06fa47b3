"""All four families on the digits, with equal seconds of training: one table and one figure.

Trains with the project's own commands, about two minutes each on two quiet cores (--quick: half a minute), and
writes results.json, report.md and report.png. Repeat an interrupted command to continue.
"""

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib
import matplotlib.ticker
import torch
from tqdm import tqdm

from dnnlib.files import atomic_write, read_records
from dnnlib.util import code_version
from torch_utils.pictures import image_grid
from training.config.generation import GenerationConfig, NetworksConfig, SamplingConfig
from training.config.samplers import GridConfig, SamplerConfig
from training.dataset.order import evenly_spaced
from training.generation import load
from training.metrics.small_images import RealImages
from training.snapshot import load_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
DATA = "datasets/digits.zip"
SECONDS, QUICK_SECONDS = 100, 25
PROBE = 0.12  # of the seconds; how long the run takes that says how fast a family trains here
SNAPSHOTS = 8
SAMPLES, SHOWN = 1000, 100
LIKELIHOODS = 100
STDS = ("0.030", "0.060", "0.100", "0.150", "0.200")  # of the averages that are tried after the training
STEPS = (4, 6, 8, 12, 18, 32)  # of the sampler; one evaluation of the network each
BEST = 18
METRICS = ("fd_pixels", "prdc_pixels")


def whole(images: float, multiple: int = 256) -> int:
    return max(round(images / multiple), 1) * multiple


def warmup(duration: int) -> str:
    """That of the digits presets, less where a training is very short."""
    return f"--warmup={min(3200, whole(0.1 * duration))}"


@dataclass(frozen=True)
class Family:
    """How a family is trained.

    Args:
        schedule: duration -> options that follow it.
        bound: whether it says an upper bound of its bits per dimension, in place of an estimate: it is no denoiser.
        classes: whether it is asked for images of a class.
    """

    name: str
    script: str
    preset: str
    schedule: Callable[[int], list[str]] = lambda _duration: []
    bound: bool = False
    classes: bool = False


FAMILIES = {
    "edm2": Family("EDM2", "train_edm2.py", "digits", classes=True),
    "score_sde": Family(
        "score-SDE (VP)",
        "train_score_sde.py",
        "digits-vp",
        lambda duration: [warmup(duration), f"--decay-from={whole(0.65 * duration)}", f"--decay-to={duration}"],
    ),
    "uvit": Family(
        "U-ViT",
        "train_uvit.py",
        "digits-uvit",
        lambda duration: [warmup(duration), f"--decay-to={duration}"],
        classes=True,
    ),
    "nvae": Family("NVAE", "train_nvae.py", "digits-nvae", lambda _: ["--ema-std=0.050,0.100"], bound=True),
}


def run(*args: str) -> None:
    """Run one of the project's commands; stop where it fails."""
    print(f"\n$ python {' '.join(args)}", flush=True)
    done = subprocess.run([sys.executable, *args], cwd=ROOT)
    if done.returncode != 0:
        sys.exit(done.returncode)


def train(family: Family, out: Path, seconds: float) -> dict[str, Any]:
    """Train for about so many seconds; gives duration in images, and the seconds that it took."""
    common = [family.script, f"--data={DATA}", f"--preset={family.preset}", "--preview=0"]
    plan = out / "plan.json"
    if not plan.is_file():
        probe = out / "probe"
        hours = max(PROBE * seconds, 6) / 3600
        run(*common, f"--outdir={probe}", "--duration=1Mi", "--status=256", "--snapshot=0", f"--max-time={hours}")
        stats = read_records(probe / "stats.jsonl")[-1]
        speed = stats["nimg"] / stats["seconds"]
        plan.write_text(json.dumps({"duration": whole(seconds * speed, 256 * SNAPSHOTS)}))
    duration = json.loads(plan.read_text())["duration"]
    every = [f"--{what}={max(duration // SNAPSHOTS, 1024)}" for what in ("status", "snapshot", "checkpoint")]
    run(*common, f"--outdir={out / 'run'}", f"--duration={duration}", *every, *family.schedule(duration))
    stats = read_records(out / "run" / "stats.jsonl")[-1]
    if stats["nimg"] < duration:
        sys.exit("The training was interrupted: repeat the command to continue.")
    return {"duration": duration, "train_seconds": stats["seconds"]}


def samples(net: Path, family: Family, steps: int) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Images of the seeds 0, 1, ..., the classes asked for where the network knows classes, and seconds."""
    sampling = SamplingConfig(device="cpu")
    if not family.bound:
        levels = GridConfig(num_steps=steps, sigma_max=20.0, sigma_min=0.02)
        sampling = dataclasses.replace(sampling, sampler=SamplerConfig(solver="sqrt-3m", grid=levels))
    if family.classes:
        sampling = dataclasses.replace(sampling, class_policy="balanced")
    loaded = load(GenerationConfig(networks=NetworksConfig(net=str(net)), sampling=sampling))
    start = time.perf_counter()
    batches = list(loaded.images(range(SAMPLES), max_batch_size=250, verbose=False))
    seconds = time.perf_counter() - start
    with_classes = batches[0].labels is not None
    classes = torch.cat([batch.labels for batch in batches]).argmax(dim=1) if with_classes else None
    return torch.cat([batch.images for batch in batches]), classes, seconds


def bits_per_dim(net: Path, bound: bool, out: Path) -> dict[str, float]:
    """On 17 gray levels, which is what the digits have (and what NVAE's preset has been trained on)."""
    command = ["calculate_likelihood.py", f"--net={net}", f"--data={DATA}", f"--num={LIKELIHOODS}"]
    accuracy = ["--samples=100"] if bound else ["--levels=17", "--rtol=1e-3", "--atol=1e-3"]
    run(*command, *accuracy, f"--out={out}")
    summary = read_records(out)[-1]["summary"]
    return {name: summary[name] for name in ("bits_per_dim", "bits_per_dim_error")}


def compare(key: str, out: Path, reals: RealImages, seconds: float) -> dict[str, Any]:
    """Train and measure one family; what has been measured is not measured again."""
    family, done = FAMILIES[key], out / "results.json"
    if done.is_file():
        return json.loads(done.read_text())
    out.mkdir(parents=True, exist_ok=True)
    trained = train(family, out, seconds)
    run("reconstruct_phema.py", f"--indir={out / 'run'}", f"--outdir={out / 'ema'}", f"--outstd={','.join(STDS)}")
    nets = {std: sorted((out / "ema").glob(f"phema-*-{std}.safetensors"))[-1] for std in STDS}
    denoiser = not family.bound
    by_std: dict[str, float] = {}
    best: tuple[str, dict[str, float], float] = ("", {}, 0.0)
    for std, net in tqdm(nets.items(), desc=f"{family.name}: averages"):
        images, classes, took = samples(net, family, BEST)
        figures = reals.compare(images, classes)
        by_std[std] = figures["fd_pixels"]
        if by_std[std] == min(by_std.values()):
            best = (std, figures, took)
            torch.save(images[:SHOWN], out / "shown.pt")
    std, figures, took = best
    by_cost = [(BEST if denoiser else 1, took, figures["fd_pixels"])]
    for steps in [steps for steps in STEPS if denoiser and steps != BEST]:
        images, classes, seconds_of_all = samples(nets[std], family, steps)
        by_cost.append((steps, seconds_of_all, reals.compare(images, classes)["fd_pixels"]))
    result = {
        "family": family.name,
        "preset": family.preset,
        "bound": family.bound,
        "parameters": sum(p.numel() for p in load_network(nets[std]).net.parameters()),
        **trained,
        "ema_std": std,
        "sample_seconds": took,
        "figures": figures,
        "by_std": by_std,
        "by_cost": sorted(by_cost),
        **bits_per_dim(nets[std], family.bound, out / "bits.jsonl"),
    }
    with atomic_write(done, "w") as f:
        f.write(json.dumps(result, indent=2) + "\n")
    return result


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "family": lambda r: r["family"],
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
    "images seen": lambda r: f"{r['duration']:,}",
    "training, s": lambda r: f"{r['train_seconds']:.0f}",
    "1,000 samples, s": lambda r: f"{r['sample_seconds']:.1f}",
    "best EMA": lambda r: r["ema_std"],
    "fd_pixels": lambda r: f"{r['figures']['fd_pixels']:.2f}",
    "precision": lambda r: f"{r['figures']['precision_pixels']:.2f}",
    "recall": lambda r: f"{r['figures']['recall_pixels']:.2f}",
    "distance ratio": lambda r: f"{r['figures']['distance_ratio']:.2f}",
    "class agreement": lambda r: f"{r['figures']['agreement']:.1%}" if "agreement" in r["figures"] else "",
    "bits/dim": lambda r: ("≤ " if r["bound"] else "") + f"{r['bits_per_dim']:.2f} ± {r['bits_per_dim_error']:.2f}",
}


def table(results: list[dict[str, Any]], floor: dict[str, float]) -> str:
    """The results as Markdown, with real images beside them."""
    real = {name: "" for name in COLUMNS} | {
        "family": "real digits, drawn with replacement",
        "fd_pixels": f"{floor['fd_pixels']:.2f}",
        "precision": f"{floor['precision_pixels']:.2f}",
        "recall": f"{floor['recall_pixels']:.2f}",
    }
    rows = [{name: show(result) for name, show in COLUMNS.items()} for result in results] + [real]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(path: Path, results: dict[str, dict[str, Any]], out: Path, reals: RealImages, floor: float) -> None:
    fig, axes = plt.subplots(2, 5, figsize=(25, 11), layout="constrained")
    chosen = reals.images[torch.from_numpy(evenly_spaced(len(reals.images), SHOWN))]
    pictures = {"real digits": chosen} | {r["family"]: torch.load(out / key / "shown.pt") for key, r in results.items()}
    for place, (title, images) in zip(axes[0], pictures.items(), strict=True):
        place.imshow(image_grid(images.numpy(), 10)[0], cmap="gray", vmin=0, vmax=255)
        place.set_title(title, fontsize=16)
        place.axis("off")
    by_ema, by_cost, spread, bits, cost = axes[1]
    for number, r in enumerate(results.values()):
        style: dict[str, Any] = dict(color=f"C{number}", marker="osD^"[number], label=r["family"])
        by_ema.semilogy([float(std) for std in r["by_std"]], list(r["by_std"].values()), **style)
        by_cost.loglog([c[1] for c in r["by_cost"]], [c[2] for c in r["by_cost"]], **style)
        spread.plot(r["figures"]["precision_pixels"], r["figures"]["recall_pixels"], markersize=14, **style)
        hatch = "//" if r["bound"] else None
        error = r["bits_per_dim_error"]
        bits.bar(r["family"], r["bits_per_dim"], yerr=error, color=f"C{number}", hatch=hatch, capsize=4)
        cost.loglog(r["parameters"], r["train_seconds"] / r["duration"] * 1000, markersize=14, **style)
    for place in (by_ema, by_cost):
        place.axhline(floor, color="gray", linestyle="--", label=f"as many real digits: {floor:.2f}")
        place.set_ylabel("fd_pixels, lower is better", fontsize=13)
        for axis in (place.xaxis, place.yaxis):
            axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    by_ema.set_yticks([0.1, 0.2, 0.5, 1])
    by_cost.set_yticks([0.1, 0.2, 0.5, 1])
    by_cost.set_xticks([0.1, 0.2, 0.5, 1, 2, 5])
    by_ema.set_title("EMA chosen after the training", fontsize=16)
    by_ema.set_xlabel("width of the EMA profile (share of the training)", fontsize=13)
    by_cost.set_title(f"Steps: {', '.join(map(str, STEPS))} (NVAE: 1)", fontsize=16)
    by_cost.set_xlabel("seconds for 1,000 images on this machine", fontsize=13)
    spread.set_title("Precision and recall", fontsize=16)
    spread.legend(*by_ema.get_legend_handles_labels(), fontsize=12, loc="lower left")
    spread.set(
        xlim=(0, 1), ylim=(0, 1), xlabel="precision: samples among real digits", ylabel="recall: real among samples"
    )
    bits.set_title("Bits per dimension, lower is better", fontsize=16)
    bits.set(ylabel="of 17 gray levels (hatched: an upper bound)", ylim=(math.floor(bits.get_ylim()[0]), None))
    cost.set_title("Cost of training", fontsize=16)
    cost.set(xlabel="parameters", ylabel="milliseconds per image")
    for place in axes[1]:
        place.grid(alpha=0.3)
    description = f"scripts/compare_families.py, OpenEDM2 {code_version()}"
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=80, metadata={"Description": description})
    plt.close(fig)


@click.command()
@click.option("--outdir", help="Where everything goes  [default: out/families]", type=click.Path(path_type=Path))
@click.option("--seconds", help=f"Training time of each family  [default: {SECONDS}]", type=click.FloatRange(min=1))
@click.option("--quick", help=f"{QUICK_SECONDS} seconds each", is_flag=True)
def main(outdir: Path | None, seconds: float | None, quick: bool) -> None:
    """Train every family on the digits with equal seconds, and compare them."""
    out = (outdir or ROOT / "out" / ("families-quick" if quick else "families")).resolve()
    seconds = seconds or (QUICK_SECONDS if quick else SECONDS)
    reals = RealImages(ROOT / DATA, METRICS)
    results = {key: compare(key, out / key, reals, seconds) for key in FAMILIES}
    drawn = torch.randint(len(reals.images), [SAMPLES], generator=torch.Generator().manual_seed(0))
    floor = reals.compare(reals.images[drawn])
    text = table(list(results.values()), floor)
    (out / "report.md").write_text(text + "\n")
    draw(out / "report.png", results, out, reals, floor["fd_pixels"])
    print(f"\n{text}\n\nPicture: {out / 'report.png'}")


if __name__ == "__main__":
    main()
