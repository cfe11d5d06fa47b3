"""The command toy_example.py: training, the figure, its numbers, and messages about bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import GOLDEN, ROOT, fails_with, run_cli, tiny_network

import toy_example
from toy_example import CFG_NET, GNET, NET, ToyModel, gt, main
from training.config.guidance import GuidanceConfig
from training.encoders import StandardRGBEncoder
from training.snapshot import load_network, read_metadata, save_network
from training.toy.evaluation import measure
from training.toy.sampling import sample_toy

OFFICIAL = GOLDEN / "official" / "toy-clsA-layers03-dim32.pkl"


def fail(*args, **kwargs):
    raise RuntimeError("not in this test")


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling takes longer than a few iterations without."""
    monkeypatch.setattr(torch, "compile", fail)


def train_guide(folder: Path, iterations: int) -> None:
    """Train as the guide in the repository was trained, for as long if `iterations` is 512."""
    options = ["--cls=A", "--layers=4", "--dim=32", f"--iterations={iterations}", "--seed=0", "--viz=0", "--device=cpu"]
    result = run_cli(main, "train", f"--outdir={folder}", f"--save={folder / 'frames'}", *options)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", fail)
        train_guide(folder, 256)
    return folder


def test_train(trained):
    assert [path.name for path in trained.glob("*.safetensors")] == ["iter0256.safetensors"]
    path = trained / "iter0256.safetensors"
    metadata = read_metadata(path)
    assert metadata["nimg"] == 256 * 4096
    assert metadata["command"] == "python toy_example.py train --cls=A --layers=4 --dim=32 --iterations=256 --seed=0"
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    quality = measure(gt("A"), sample_toy(load_network(path).net, noise))
    assert quality.outliers.value < 0.5 and quality.branch_kl.value < 0.5  # an untrained one: 0.9 and more
    frames = sorted((trained / "frames").iterdir())
    assert [frame.name for frame in frames] == [f"iter{i:04d}.png" for i in range(64, 257, 64)]
    with PIL.Image.open(frames[-1]) as image:
        assert min(image.size) > 500


@pytest.mark.slow
def test_the_same_seed_gives_the_guide_in_the_repository(tmp_path):
    """Here the weights agree to 3e-6; on other processors, training amplifies their rounding. Another seed: 1.4."""
    train_guide(tmp_path, 512)
    ours, guide = (
        torch.cat([p.flatten() for p in load_network(path).net.parameters()])
        for path in (tmp_path / "iter0512.safetensors", GNET)
    )
    assert (ours - guide).norm() < 0.1 * guide.norm()


def test_animation(no_compiler, tmp_path, monkeypatch):
    monkeypatch.setattr("training.toy.training.FRAME_INTERVAL", 2)
    path = tmp_path / "training.gif"
    result = run_cli(main, "train", "--layers=1", "--dim=8", "--iterations=3", f"--save={path}")
    assert result.exit_code == 0, result.output
    with PIL.Image.open(path) as image:
        assert image.n_frames == 2
    assert not list(tmp_path.glob("*.safetensors"))


def test_plot(tmp_path, monkeypatch):
    monkeypatch.setattr("training.toy.figure.SAMPLES", 500)
    monkeypatch.setattr("training.toy.figure.GRID", 40)
    path = tmp_path / "toy.png"
    options = ["--guidance=2", "--cfg-guidance=3", "--cls=A", "--seed=1", "--device=cpu"]
    result = run_cli(main, "plot", f"--save={path}", *options)
    assert result.exit_code == 0, result.output
    with PIL.Image.open(path) as image:
        assert image.size[0] == 1600
        made_by = image.text["Description"]
    assert made_by.startswith("python toy_example.py plot --cls=A --seed=1 ") and "--cfg-guidance=3" in made_by


def test_plot_without_a_display(tmp_path, monkeypatch):
    """Published pickles work; without a guide there are fewer panels; no display, no window."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = (
        "import training.toy.figure as f; f.SAMPLES = 500; f.GRID = 40\n"
        f"from toy_example import main; main(['plot', '--net={OFFICIAL}'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == [
        "No display: saving the figure as toy_example.png (--save chooses another name)",
        "toy_example.png",
    ]
    with PIL.Image.open(tmp_path / "toy_example.png") as image:
        assert image.size[0] == 800


def test_evaluate(tmp_path):
    path = tmp_path / "toy.json"
    options = ["--samples=1000", "--weights=1.5,3", "--seed=2", f"--json={path}"]
    result = run_cli(main, "evaluate", f"--net={NET}", f"--gnet={GNET}", f"--cfg-net={CFG_NET}", "--offline", *options)
    assert result.exit_code == 0, result.output
    facts = json.loads(path.read_text())
    assert facts["files"] == {"net": NET.name, "gnet": GNET.name, "cfg_net": CFG_NET.name}
    kinds = [(row["sampling"], row["weight"]) for row in facts["rows"]]
    guided = [(name, w) for name in ("classifier-free guidance", "autoguidance") for w in (1.5, 3)]
    assert kinds == [("ground truth", None), ("no guidance", 1.0), *guided]
    for row, line in zip(facts["rows"], result.stdout.splitlines()[1:], strict=True):
        assert line.startswith(row["sampling"]) and f"{row['outliers']['value']:.2%}" in line
        assert row["nll"]["error"] > 0
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(2))
    expected = measure(gt("A"), sample_toy(load_network(NET).net, noise))
    assert facts["rows"][1]["nll"]["value"] == pytest.approx(expected.nll.value, rel=1e-4)


OPTIONS_OF_GUIDANCE = [
    ["--guidance-schedule=linear", "--guidance-ramp=0.02,1", "--guidance-end=1.2", "--guidance-interval=0.01,2"],
    ["--guidance-method=apg", "--apg-eta=0.5", "--apg-norm=0.1", "--apg-momentum=0.2"],
    ["--guidance-method=cfg-zero", "--zero-init-steps=2"],
]


@pytest.fixture(scope="module")
def plain_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.json"
    result = run_cli(main, "evaluate", "--samples=100", "--weights=2", f"--json={path}")
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("options", OPTIONS_OF_GUIDANCE, ids=lambda options: options[0])
def test_evaluate_other_guidance(plain_rows, tmp_path, options):
    path = tmp_path / "toy.json"
    result = run_cli(main, "evaluate", "--samples=100", "--weights=2", f"--json={path}", *options)
    assert result.exit_code == 0, result.output
    changed = json.loads(path.read_text())["rows"]
    assert changed[:2] == plain_rows[:2]
    assert all(plain != row for plain, row in zip(plain_rows[2:], changed[2:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_weight_that_falls_as_the_noise_grows(seed):
    """w = 3 alone has a mean -log p of several nats and twice the branch KL (docs/autoguidance.md)."""
    how = GuidanceConfig(guidance_schedule="linear", guidance_ramp=(0.02, 1.0))
    noise = torch.randn(8192, 2, generator=torch.Generator().manual_seed(seed))
    net, gnet = (load_network(path).net for path in (NET, GNET))
    quality = measure(gt("A"), sample_toy(net, noise, gnet, guidance=3.0, how=how))
    assert quality.outliers.value <= 0.064
    assert quality.branch_kl.value <= 0.09
    assert quality.nll.value < -0.2


def test_samples_that_overflow(tmp_path):
    """They are outliers, and the file is valid JSON."""
    path = tmp_path / "toy.json"
    result = run_cli(main, "evaluate", "--samples=100", "--weights=-100", f"--json={path}")
    assert result.exit_code == 0, result.output
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    row = json.loads(path.read_text())["rows"][2]
    assert row["nll"]["value"] is None and row["outliers"]["value"] == 1


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["train", "--cls=C"], ["--cls", "unknown class 'C' (known: A, B, AB)"]),
        (["train", "--layers=0"], ["--layers"]),
        (["train", "--iterations=0"], ["--iterations"]),
        (["train", "--save=toy.mp4"], ["--save=toy.mp4: frames are saved as a .gif file, or as PNG files in a folder"]),
        (["train", "--save=README.md"], ["--save=README.md: frames are saved as"]),
        (["train", "--save=LICENSE"], ["--save=LICENSE: there is already a file of that name"]),
        (["plot", f"--cfg-net={NET}"], ["was trained on A alone, like --net: give a model of both classes"]),
        (["plot", f"--net={NET}", "--cfg-guidance=2"], ["classifier-free guidance beside autoguidance: give --gnet"]),
        (["plot", "--guidance=101"], ["--guidance", "range -100.0<=x<=100.0"]),
        (["plot", "--save=toy.jpeg2"], ["--save=toy.jpeg2", ".png, .pdf, .svg"]),
        (["plot", f"--gnet={NET}"], [f"--gnet={NET} is the same model as --net={NET}: give a worse one, or no --gnet"]),
        (["evaluate", f"--net={NET}", f"--gnet={NET}"], ["is the same model as --net"]),
        (["plot", "--cls=C"], ["--cls", "unknown class 'C'"]),
        (["plot", f"--net={NET}", "--guidance=2"], ["--guidance=2 needs a guiding model: give --gnet"]),
        (["plot", "--cls=B"], ["--cls=B, but", "was trained on A"]),
        (["plot", "--guidance=nan"], ["--guidance must be a finite number"]),
        (["plot", "--net=nowhere.safetensors"], ["nowhere.safetensors: no such file"]),
        (["evaluate", "--weights=1,x"], ["--weights", "'1,x' is not a list of numbers"]),
        (["evaluate", "--weights=inf"], ["--weights", "'inf' is not a list of numbers"]),
        (["evaluate", "--samples=1"], ["--samples"]),
        (["evaluate", "--guidance-method=cfg++"], ["--guidance-method=cfg++ is a rule for steps of Euler's method"]),
        (["evaluate", "--apg-eta=1"], ["--apg-eta has no effect with --guidance-method=cfg: leave it out"]),
        (["evaluate", "--guidance-schedule=linear"], ["needs --guidance-ramp=LO,HI"]),
    ],
)  # fmt: skip
def test_bad_options(args, fragments):
    fails_with(run_cli(main, *args), *fragments)


def test_device_that_is_not_there(tmp_path, monkeypatch):
    """An error leaves no folder behind."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run_cli(main, "train", f"--outdir={tmp_path / 'out'}", "--device=cuda")
    fails_with(result, "--device=cuda is not available on this machine")
    assert not list(tmp_path.iterdir())


def test_models_of_another_kind(tmp_path):
    path = tmp_path / "images.safetensors"
    save_network(path, tiny_network(), StandardRGBEncoder(), {})
    for option in ("--net", "--gnet", "--cfg-net"):
        fails_with(
            run_cli(main, "plot", f"{option}={path}"), f"{option}={path} holds a Precond, not a model of the toy"
        )
    save_network(path, ToyModel(in_dim=3), StandardRGBEncoder(), {})
    fails_with(run_cli(main, "evaluate", f"--net={path}"), "is a model of 3 dimensions, not 2")


def test_without_matplotlib(no_compiler, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails_with(run_cli(main, "plot", "--save=toy.png"), "pictures need matplotlib: pip install")
    fails_with(run_cli(main, "train", "--save=toy.gif"), "pictures need matplotlib: pip install")
    result = run_cli(main, "train", "--iterations=1", "--dim=1")
    assert result.exit_code == 0 and "Note: no window: pictures need matplotlib" in result.output


def test_backend_that_matplotlib_does_not_know(tmp_path):
    done = subprocess.run(
        [sys.executable, "toy_example.py", "plot", f"--save={tmp_path / 'toy.png'}"],
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    # Not followed by all that it knows.
    line = r"Error: matplotlib does not start: .*'nonsense' is not a valid value for backend \(unset MPLBACKEND\)\n"
    assert re.fullmatch(line, done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_backend_that_is_not_installed(no_compiler, tmp_path, monkeypatch, error):
    """`plot` ends, as the user asked for a window; `train` continues and saves its frames."""
    from matplotlib import pyplot

    def fail(**_kwargs):
        raise error("it requires Tornado.")

    monkeypatch.setattr(pyplot, "figure", fail)
    problem = "matplotlib cannot show figures: it requires Tornado. (unset MPLBACKEND, or set it to agg)"
    fails_with(run_cli(main, "plot"), problem)
    result = run_cli(main, "train", "--iterations=1", "--dim=1", f"--save={tmp_path / 'frames'}")
    assert result.exit_code == 0 and f"Note: no window: {problem}" in result.output
    assert [path.name for path in tmp_path.glob("frames/*")] == ["iter0001.png"]


def test_window(no_compiler, monkeypatch):
    """Drawn into while it is open; when the user closes it, training continues."""
    from matplotlib import pyplot

    drawn: list[int] = []
    figure = pyplot.figure()
    monkeypatch.setattr(figure, "show", lambda: None)
    monkeypatch.setattr(figure.canvas, "draw_idle", lambda: drawn.append(1))
    monkeypatch.setattr(figure.canvas, "flush_events", lambda: pyplot.close(figure) if len(drawn) == 2 else None)
    monkeypatch.setattr("training.toy.figure.new_figure", lambda *_args, **_kwargs: (figure, True))
    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("waits for a window that is closed"))
    monkeypatch.setattr("training.toy.training.FRAME_INTERVAL", 1)
    result = run_cli(main, "train", "--iterations=4", "--layers=1", "--dim=8")
    assert result.exit_code == 0, result.output
    assert len(drawn) == 2


def test_every_option_is_tested():
    """The options above, by command."""
    tested = {
        "train": {"outdir", "cls", "layers", "dim", "iterations", "seed", "viz", "save", "device"},
        "plot": {"net", "gnet", "cfg_net", "cls", "seed", "device", "offline", "guidance", "cfg_guidance", "save"},
        "evaluate": {"net", "gnet", "cfg_net", "cls", "seed", "device", "offline", "weights", "samples", "json_path"}
        | {option.partition("=")[0][2:].replace("-", "_") for options in OPTIONS_OF_GUIDANCE for option in options},
    }
    assert {name: {p.name for p in c.params} for name, c in main.commands.items()} == tested
    assert toy_example.__all__ == ["ToyModel", "gt"]
