"""Everything with everything: each kind of network through each command, sampler, rule of guidance and edit.

A cell of the table either works, or is one clear line, of which docs/choose.md ("What cannot be") has a row. All rows
are tried with all columns, so there is no third kind.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
from conftest import ROOT, fails_with, images_in, make_dataset, npy, random_images, run_cli

import calculate_likelihood
import calculate_metrics
import count_flops
import dataset_tool
import edit_images
import generate_images
import reconstruct_phema
import snapshot_tool
import train_consistency
from scripts import optimize_schedule
from training.conditioning import Conditioning, DataSpec
from training.config.consistency import CONSISTENCY_PRESETS
from training.config.guidance import METHODS
from training.config.restoration import METHODS as RESTORATIONS
from training.config.samplers import SOLVERS
from training.dataset.images import ImageFolderDataset
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder, WordEncoder, text_record
from training.families import ARCHITECTURES
from training.monitoring.outdir import snapshot_name
from training.snapshot import save_network

NONE, CLASSES, TEXT = Conditioning.of_labels(0), Conditioning.of_labels(10), Conditioning.of_text(8, 32)


class Column(NamedTuple):
    """A kind of network: the preset with its architecture, what makes it small, and what its images follow."""

    architecture: str
    preset: str
    smaller: dict[str, Any]
    conditioning: Conditioning


EDM2 = Column("edm2.Precond", "digits", {"model_channels": 8, "channels_per_head": 8}, CLASSES)
SMALL_UVIT = {"embed_dim": 16, "depth": 3, "num_heads": 2}
COLUMNS = {
    "EDM2": EDM2,
    "VE": Column("score_sde.ScoreSDE", "digits-ve", {"nf": 8}, NONE),
    "VP": Column("score_sde.ScoreSDE", "digits-vp", {"nf": 8}, NONE),
    "U-ViT": Column("uvit.UViTDenoiser", "digits-uvit", SMALL_UVIT, CLASSES),
    "U-ViT text": Column("uvit.UViTDenoiser", "digits-uvit-text", SMALL_UVIT, TEXT),
    "NVAE": Column("nvae.NVAE", "digits-nvae", {"num_channels_enc": 8, "num_channels_dec": 8, "levels": 256}, NONE),
    "consistency": EDM2,
    "latents": EDM2,
    "classifier": Column("classifier.NoisyClassifier", "digits-classifier", {"nf": 8}, CLASSES),
}


def network(name: str, seed: int) -> torch.nn.Module:
    """A small network of random weights, whose output is not zero."""
    column = COLUMNS[name]
    torch.manual_seed(seed)
    architecture = ARCHITECTURES[column.architecture]
    arguments = replace(architecture.presets[column.preset].config.network, **column.smaller)
    spec = DataSpec(channels=4 if name == "latents" else 3, resolution=8, conditioning=column.conditioning)
    net = architecture.build(arguments, spec)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, vae) -> Callable[[str], Path]:
    """Folder of a kind of network: run/ with snapshots at two times and of two widths, and its images."""
    root, made = tmp_path_factory.mktemp("matrix"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = root / name.replace(" ", "-")
            (made[name] / "run").mkdir(parents=True)
            for seed, (kimg, std) in enumerate([(1, 0.05), (1, 0.10), (2, 0.05), (2, 0.10)]):
                write_snapshot(made[name] / "run", name, network(name, seed), kimg, std, vae)
            write_images(made[name], name)
        return made[name]

    return folder


def write_snapshot(run: Path, name: str, net: Any, kimg: int, std: float, vae: Path) -> None:
    metadata: dict[str, Any] = {"nimg": 1000 * kimg, "ema_std": std}
    if name == "U-ViT text":
        metadata["text_encoder"] = text_record(WordEncoder())
    if name == "consistency":
        metadata["config"] = CONSISTENCY_PRESETS["digits-ect"].config.to_json()
    encoder = StabilityVAEEncoder(str(vae)) if name == "latents" else StandardRGBEncoder(*net.spec.pixel_range)
    save_network(run / snapshot_name(1000 * kimg, f"-{std:.3f}"), net, encoder, metadata, torch.float32)


def write_images(folder: Path, name: str) -> None:
    """data.zip: what a network makes; ref.safetensors: statistics of that; training.zip: what it is trained on."""
    conditioning = COLUMNS[name].conditioning
    pictures = random_images(16, size=64 if name == "latents" else 8)
    classes = {file: i % 10 for i, file in enumerate(pictures)} if conditioning is not NONE else None
    data = make_dataset(folder / "data.zip", pictures, classes)
    ref = [f"--data={data}", f"--dest={folder / 'ref.safetensors'}", "--metrics=fd_pixels", "--workers=0"]
    assert run_cli(calculate_metrics.ref, *ref).exit_code == 0
    if name == "latents":
        moments = np.random.default_rng(0).standard_normal([16, 8, 8, 8]).astype(np.float32)
        latents = {f"00000/img{i:08d}.npy": npy(moments[i]) for i in range(16)}
        make_dataset(folder / "training.zip", latents, {file: i % 10 for i, file in enumerate(latents)})
        return
    if conditioning is TEXT:
        options = ["--text-encoder=words", "--template=a {}", "--class-names=0,1,2,3,4,5,6,7,8,9"]
        captioned = folder / "captioned.zip"
        result = run_cli(dataset_tool.main, "captions", f"--source={data}", f"--dest={captioned}", *options)
        assert result.exit_code == 0, result.output
        captioned.replace(data)
    shutil.copy(data, folder / "training.zip")


# ---------------------------------------------------------------------------------------------------------
# Rows. {net} is a snapshot, {guide} another one of the same kind, {run} the folder of both, {edm2} and {noisy} an EDM2
# network and a classifier of other folders, {data} and {training} images, {ref} statistics of {data}, {out} where results go;
# {two steps} is for all but NVAE.

SEEDS = ["--net={net}", "--seeds=0-1", "--outdir={out}"]
STEPS = ["--sampler=euler", "--steps=3"]
GUIDED = [*SEEDS, *STEPS, "--guidance=0.7"]
EDIT = ["--net={net}", "--data={data}", "--indices=0", "--outdir={out}"]
FILLED = [*EDIT, *STEPS, "--fills=1"]
MEASURED = ["--ref={ref}", "--metrics=fd_pixels", "--num=4", "{two steps}"]
BRIEF = ["--preset=digits-ect", "--duration=256", "--batch=128", "--status=128", "--snapshot=0", "--preview=0"]
OWN_STEPS = {
    "rk45": ["--rtol=0.5", "--atol=0.5"],
    "dpm-adaptive": ["--adaptive-rtol=2", "--adaptive-atol=0.5"],
    "consistency": [],
}
ENOUGH = {name: "--steps=24" if kind.grid == "times" else "--steps=3" for name, kind in SOLVERS.items()}
SAMPLERS = {name: [f"--sampler={name}", *OWN_STEPS.get(name, [ENOUGH[name]])] for name in SOLVERS}
RULES = {
    **{name: [f"--guidance-method={name}"] for name in METHODS},
    **{f"{name} weight": [f"--guidance-schedule={name}", "--guidance-ramp=0.3,3"] for name in ("linear", "cosine")},
    "interval": ["--guidance-interval=0.3,3"],
}

ROWS: dict[str, tuple[click.Command, list[str]]] = {
    **{f"sampler {name}": (generate_images.main, [*SEEDS, *options]) for name, options in SAMPLERS.items()},
    **{f"rule {name}": (generate_images.main, [*GUIDED, "--gnet={guide}", *rule]) for name, rule in RULES.items()},
    "guide without a condition": (generate_images.main, GUIDED),
    "guide EDM2": (generate_images.main, [*GUIDED, "--gnet={edm2}"]),
    "guide classifier": (generate_images.main, [*GUIDED, "--classifier={noisy}", "--class=3"]),
    "class": (generate_images.main, [*SEEDS, *STEPS, "--class=3"]),
    "prompt": (generate_images.main, [*SEEDS, *STEPS, "--prompt=a 3"]),
    "temperature": (generate_images.main, [*SEEDS, "--temperature=0.7"]),
    "inpaint": (edit_images.inpaint, [*FILLED, "--ratio=0.5"]),
    "colorize": (edit_images.colorize, FILLED),
    **{
        f"restore {name}": (edit_images.restore, [*FILLED, "--task=super-resolution", f"--method={name}"])
        for name in RESTORATIONS
    },
    "interpolate": (edit_images.interpolate, ["--net={net}", "--seeds=0-1", "--frames=3", "--outdir={out}"]),
    "encode": (edit_images.encode, EDIT),
    "reconstruct": (edit_images.reconstruct, [*EDIT, "--sheet={out}/sheet.png"]),
    "traverse": (edit_images.traverse, [*SEEDS, "--columns=2"]),
    "likelihood": (calculate_likelihood.main, ["--net={net}", "--data={data}", "--num=1", "--out={out}/x.jsonl"]),
    "post-hoc EMA": (reconstruct_phema.main, ["--indir={run}", "--outstd=0.07", "--outdir={out}"]),
    "count_flops": (count_flops.main, ["{net}"]),
    "inspect": (snapshot_tool.inspect, ["{net}"]),
    "export": (snapshot_tool.export, ["{net}", "{out}/hub", "--license=mit"]),
    "convert": (snapshot_tool.convert, ["{net}", "{out}/copy.safetensors"]),
    "metrics": (calculate_metrics.gen, ["--net={net}", *MEASURED, "--outdir={out}"]),
    "sweep": (calculate_metrics.sweep, ["--net={run}", *MEASURED, "--vary=ema-std=0.06", "--outdir={out}"]),
    "levels": (
        optimize_schedule.main,
        ["--net={net}", "--steps=3", "--images=2", "--candidates=5", "--outdir={out}"],
    ),
    "tuning": (train_consistency.main, ["--init-from={net}", "--data={training}", *BRIEF, "--outdir={out}/ect"]),
}
WRITES_NOTHING = ("count_flops", "inspect")


class Impossible(NamedTuple):
    """Cells that cannot be, why, and the row of docs/choose.md that says so.

    `rows` are names, or the first words of names.
    """

    rows: str
    columns: str
    message: str
    docs: str


DENOISERS = "EDM2, VE, VP, U-ViT, U-ViT text, latents"
GUIDES = "rule, guide without a condition, guide EDM2, guide classifier"
EDITS = "inpaint, colorize, restore, encode"
IMPOSSIBLE = [
    Impossible(
        f"sampler, {GUIDES}, {EDITS}, class, prompt",
        "NVAE",
        "has no meaning for NVAE networks",
        "samplers, guidance, restoration with an NVAE",
    ),
    Impossible("levels", "NVAE", "NVAE is no denoiser", "samplers, guidance, restoration with an NVAE"),
    Impossible(
        "temperature", f"{DENOISERS}, consistency", "--temperature has no meaning for", "`--temperature` of a denoiser"
    ),
    Impossible(
        "reconstruct, traverse",
        f"{DENOISERS}, consistency",
        "this needs the latents of an NVAE",
        "`reconstruct` and `traverse` with a denoiser",
    ),
    Impossible(EDITS, "latents", "works on latents", "editing by a network that works on latents"),
    Impossible("interpolate", "latents", "works on latents", "editing by a network that works on latents"),
    Impossible("likelihood", "latents", "gives no density of pixels", "likelihood by a network that works on latents"),
    Impossible(
        f"{EDITS}, interpolate, likelihood, levels",
        "consistency",
        "is no denoiser any more",
        "likelihood, restoration, `encode`, optimal levels of a consistency model",
    ),
    Impossible(
        "tuning",
        "VE, VP, NVAE, classifier",
        "without EDM's preconditioning",
        "consistency tuning of noise or score networks",
    ),
    Impossible(
        "class", "VE, VP, U-ViT text", "knows no classes", "classes, prompts or guidance for networks that know none"
    ),
    Impossible(
        "prompt",
        "EDM2, VE, VP, U-ViT, latents, consistency",
        "--prompt is for networks that follow texts",
        "classes, prompts or guidance for networks that know none",
    ),
    Impossible(
        "guide without a condition",
        "EDM2, VE, VP, latents, consistency",
        "knows no images without a condition",
        "classes, prompts or guidance for networks that know none",
    ),
    Impossible(
        "guide EDM2", "VE, VP, U-ViT text, latents", "they must agree", "a guide of other images, classes or latents"
    ),
    Impossible("guide classifier", "VE", "they must agree", "a guide of other images, classes or latents"),
    Impossible(
        "guide classifier",
        "EDM2, U-ViT, U-ViT text, latents, consistency",
        "for networks that know no conditions",
        "a classifier as the guide of a network that follows classes or texts",
    ),
    Impossible(
        f"sampler, {GUIDES}, {EDITS}, class, prompt, temperature, interpolate, reconstruct, traverse, likelihood, metrics, "
        "sweep, levels",
        "classifier",
        "which makes no images",
        "images of a classifier",
    ),
    Impossible("export", "classifier", "makes no images and is not for the hub", "images of a classifier"),
]


def reason(row: str, name: str) -> Impossible | None:
    """Why a cell cannot be; None = it works."""
    for cells in IMPOSSIBLE:
        rows, columns = cells.rows.split(", "), cells.columns.split(", ")
        if name in columns and any(row == start or row.startswith(start + " ") for start in rows):
            return cells
    return None


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", COLUMNS)
def test_cell(folder_of, tmp_path, row, name):
    folder, (command, options) = folder_of(name), ROWS[row]
    newest = Path("run") / snapshot_name(2000, "-0.050")
    places = {
        "net": folder / newest,
        "guide": folder / "run" / snapshot_name(1000, "-0.100"),
        "run": folder / "run",
        "edm2": folder_of("EDM2") / newest,
        "noisy": folder_of("classifier") / newest,
        "data": folder / "data.zip",
        "training": folder / "training.zip",
        "ref": folder / "ref.safetensors",
        "out": tmp_path / "out",
        "two steps": "" if name == "NVAE" else "--steps=2",
    }
    result = run_cli(command, *filter(None, (option.format(**places) for option in options)))
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    impossible = reason(row, name)
    if impossible is not None:
        fails_with(result, impossible.message)
        assert not written
        return
    assert result.exit_code == 0, result.output
    assert written or row in WRITES_NOTHING
    for path in written:
        if path.suffix == ".npy":
            assert np.isfinite(np.load(path, allow_pickle=False)).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_rule_with_every_sampler(folder_of, tmp_path, solver, rule):
    run = folder_of("EDM2") / "run"
    nets = [f"--net={run / snapshot_name(2000, '-0.050')}", f"--gnet={run / snapshot_name(1000, '-0.100')}"]
    options = [*nets, "--seeds=0", "--guidance=0.7", *SAMPLERS[solver], *RULES[rule], f"--outdir={tmp_path}"]
    result = run_cli(generate_images.main, *options)
    if rule == "cfg++" and solver != "euler":
        fails_with(result, "use --sampler=euler")
    elif rule in ("apg", "cfg-zero") and SOLVERS[solver].grid == "ends":
        fails_with(result, f"{solver} finds its own: set it to 0")
    else:
        assert result.exit_code == 0, result.output
        assert (tmp_path / "000000.png").is_file()


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_pixels_with_every_sampler(folder_of, tmp_path, solver):
    folder = folder_of("U-ViT")
    options = [f"--net={folder / 'run' / snapshot_name(2000, '-0.050')}", f"--data={folder / 'data.zip'}"]
    options += ["--indices=0", "--fills=1", "--box=0,4,8,8", f"--outdir={tmp_path}", *SAMPLERS[solver]]
    result = run_cli(edit_images.inpaint, *options)
    assert result.exit_code == 0, result.output
    real = ImageFolderDataset(str(folder / "data.zip"))[0][0]
    assert np.array_equal(images_in(tmp_path)["000000-00.png"].transpose(2, 0, 1)[:, :4], real[:, :4])


def test_what_cannot_be_is_explained():
    text = (ROOT / "docs" / "choose.md").read_text().partition("## What cannot be")[2]
    wanted = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert {cells.docs for cells in IMPOSSIBLE} <= wanted
    assert {"`cfg++` with samplers other than `euler`", "`apg`, `cfg-zero` with `rk45` or `dpm-adaptive`"} <= wanted
