"""The toy example: ground truth, training, sampling, pictures."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import GOLDEN, ROOT, Golden, fails_with, run_cli, tiny_network

import toy_example
from dnnlib.errors import UserError
from toy_example import CFG_NET, GNET, NET, ToyModel, gt, main
from training.encoders import StandardRGBEncoder
from training.snapshot import load_network, read_metadata, save_network
from training.toy.data import GaussianMixture
from training.toy.figure import CLOSEUP, TRAJECTORIES, draw_paper_figure
from training.toy.sampling import measure, sample_toy, support_level
from training.toy.training import ToyConfig, ToyTrainer

OFFICIAL = GOLDEN / "official" / "toy-clsA-layers03-dim32.pkl"
SAMPLER = dict(num_steps=12)  # of the golden trajectories; the rest are our defaults


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("toy")


def toy_model(golden: Golden, name: str, kwargs: str | None = None) -> ToyModel:
    meta = golden.meta[kwargs or name]
    net = ToyModel(2, meta["num_layers"], meta["hidden_dim"])
    net.load_state_dict(golden.state(name))
    return net


# ---------------------------------------------------------------------------------------------------------
# Ground truth


@pytest.mark.parametrize("cls", ["A", "B"])
def test_parameters(golden, cls):
    distribution = gt(cls)
    for name in ("phi", "mu", "Sigma"):
        assert torch.equal(getattr(distribution, name), golden[f"gt{cls}_{name}"]), name


@pytest.mark.parametrize("classes", ["A", "B", "AB"])
def test_density_and_score(golden, check, classes):
    distribution = gt(classes)
    x, sigma = golden[f"{classes}_x"], golden[f"{classes}_sigma"]
    check(distribution.pdf(x, sigma), golden[f"{classes}_pdf"], 1e-5)
    check(distribution.logp(x, 0.1), golden[f"{classes}_logp_sigma0.1"], 1e-5)
    score, expected = distribution.score(x, sigma), golden[f"{classes}_score"]
    assert score.isfinite().all()
    # Where the density is no normal float32 number, the plainly computed reference is NaN or has lost its digits.
    normal = golden[f"{classes}_pdf"] > torch.finfo(torch.float32).tiny
    assert normal.sum() > 40
    check(score[normal], expected[normal], 1e-5)


@pytest.mark.parametrize("classes", ["A", "AB"])
def test_score_is_the_gradient_of_logp(golden, check, classes):
    distribution = GaussianMixture(*(getattr(gt(classes), name).double() for name in ("phi", "mu", "Sigma")))
    x, sigma = golden[f"{classes}_x"].double(), golden[f"{classes}_sigma"].double()
    with torch.enable_grad():
        x.requires_grad_()
        gradient = torch.autograd.grad(distribution.logp(x, sigma).sum(), x)[0]
    check(distribution.score(x, sigma), gradient, 1e-12)
    check(gt(classes).score(x.detach().float(), sigma.float()), gradient, 1e-5)


def test_far_away_everything_is_finite():
    x = torch.tensor([[1e3, -1e3], [0.0, 5.0]])
    assert gt("A").logp(x).isfinite().all() and gt("A").score(x).isfinite().all()
    assert torch.equal(gt("A").pdf(x), torch.zeros(2))


def test_any_shape():
    x, sigma = torch.randn(3, 50, 2), torch.rand(3, 50)
    distribution = gt("B")
    flat = distribution.score(x.reshape(-1, 2), sigma.reshape(-1))
    torch.testing.assert_close(distribution.score(x, sigma), flat.reshape(x.shape))
    assert distribution.logp(x, 0.1).shape == (3, 50)
    assert distribution.posterior(x, sigma).shape == (3, 50, 1016)
    assert distribution.logp(x[:0]).shape == (0, 50)


def test_samples_have_the_moments_of_the_mixture():
    distribution = gt("A")
    x = distribution.sample([400, 250], 0.3, torch.Generator().manual_seed(0))
    assert x.shape == (400, 250, 2)
    mean = distribution.phi @ distribution.mu
    second = torch.einsum("k,ki,kj->ij", distribution.phi, distribution.mu, distribution.mu)
    covariance = (distribution.phi[:, None, None] * distribution.Sigma).sum(0) + second - torch.outer(mean, mean)
    x = x.reshape(-1, 2)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.006)
    torch.testing.assert_close(x.T.cov(), covariance + 0.3**2 * torch.eye(2), rtol=0, atol=0.006)


def test_both_classes_are_standardised():
    x = gt("AB").sample(100_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), torch.zeros(2), rtol=0, atol=0.05)
    torch.testing.assert_close(x.std(0), torch.full([2], 0.5), rtol=0, atol=0.02)


def test_unknown_class():
    with pytest.raises(UserError, match="unknown class 'C'"):
        gt("C")


# ---------------------------------------------------------------------------------------------------------
# Training and sampling


HAS_COMPILER = any(map(shutil.which, ("g++", "c++", "clang++")))


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler"))]
)
def test_six_iterations(golden, check, compiled, capsys):
    meta = golden.meta["train"]
    net = toy_model(golden, "train_init", "train")
    config = ToyConfig(batch=256, lr=meta["lr_ref"], lr_iter=meta["lr_iter"], ema_std=meta["ema_std"])
    trainer = ToyTrainer(net, gt("A"), config, compiled)
    losses = [trainer.step(x, sigma).item() for x, sigma in zip(golden["train_x"], golden["train_sigma"], strict=True)]
    check(losses, golden["train_losses"], 1e-5)
    for model, prefix in [(net, "train_final"), (trainer.ema, "train_ema")]:
        for name, expected in golden.state(prefix).items():
            check(model.state_dict()[name], expected, 1e-4, name)
    assert "torch.compile does not work" not in capsys.readouterr().out


def test_training_without_a_compiler(monkeypatch, capsys, golden):
    def fail(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: fail)
    trainer = ToyTrainer(toy_model(golden, "train_init", "train"), gt("A"), ToyConfig(batch=256))
    assert torch.isfinite(trainer.step(golden["train_x"][0], golden["train_sigma"][0]))
    assert capsys.readouterr().out.splitlines() == [
        "Note: torch.compile does not work here, training takes longer (no C++ compiler found)"
    ]


@pytest.mark.parametrize("name", ["trajectory", "trajectory_guided3", "trajectory_gt"])
def test_trajectories(golden, check, name):
    net = gt("A") if name == "trajectory_gt" else toy_model(golden, "model")
    gnet = toy_model(golden, "gmodel") if name == "trajectory_guided3" else None
    path: list[torch.Tensor] = []
    x = golden["sample_x_init"] / golden.meta["sampler"]["sigma_max"]
    sample_toy(net, x, gnet, guidance=3, on_step=path.append, **SAMPLER)
    check(torch.stack(path), golden[name], 1e-4)


def test_measures():
    distribution = gt("A")
    generator = torch.Generator().manual_seed(1)
    x = distribution.sample(20_000, generator=generator)
    good = measure(distribution, x)
    assert good.outliers.value == pytest.approx(0.01, abs=4 * good.outliers.error)
    assert good.nll.value == pytest.approx(-distribution.logp(x).mean().item(), rel=1e-4)
    assert 0 <= good.branch_kl.value < 0.01
    # All samples off the tree, and half of the tree without samples.
    assert measure(distribution, x + 3).outliers.value == 1
    left = x[x[:, 0] < x[:, 1]]
    lost = measure(distribution, left)
    assert lost.branch_kl.value == pytest.approx(np.log(len(x) / len(left)), abs=0.15)
    assert lost.branch_kl.value > 20 * lost.branch_kl.error
    # Standard errors are those of repetitions.
    repeated = [measure(distribution, part) for part in x.split(1000)]
    for estimates in zip(*repeated, strict=True):
        spread = np.std([e.value for e in estimates], ddof=1)
        assert np.mean([e.error for e in estimates]) == pytest.approx(spread, rel=0.6)


def test_support_holds_99_percent():
    x = gt("B").sample(50_000, generator=torch.Generator().manual_seed(5))
    assert (gt("B").logp(x) > support_level(gt("B"))).float().mean().item() == pytest.approx(0.99, abs=0.002)


def test_models_in_the_repository():
    """Autoguidance makes fewer outliers than no guidance, and keeps branches that classifier-free guidance loses."""
    expected = {NET: ("A", 64, 4096), GNET: ("A", 32, 512), CFG_NET: ("AB", 32, 512)}
    for path, facts in expected.items():
        metadata = read_metadata(path)
        config = metadata["config"]
        assert (config["cls"], config["hidden_dim"], config["iterations"]) == facts
        assert metadata["command"].startswith("python toy_example.py train --cls=") and metadata["date"]
        assert path.stat().st_size < 100_000
    net, gnet, cfg_net = (load_network(path).net for path in expected)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    plain, cfg, auto = (
        measure(gt("A"), sample_toy(net, noise, guide, w)) for guide, w in [(None, 1), (cfg_net, 2), (gnet, 2)]
    )
    assert auto.outliers.value < plain.outliers.value - 4 * auto.outliers.error
    assert auto.outliers.value < cfg.outliers.value
    assert auto.branch_kl.value < cfg.branch_kl.value / 2


# ---------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The command that made the guide in the repository."""
    folder = tmp_path_factory.mktemp("toy")
    options = ["--cls=A", "--layers=4", "--dim=32", "--iterations=512", "--seed=0", "--viz=0", "--device=cpu"]
    result = run_cli(main, "train", f"--outdir={folder}", f"--save={folder / 'frames'}", *options)
    assert result.exit_code == 0, result.output
    return folder


def test_train(trained):
    assert sorted(path.name for path in trained.glob("*.safetensors")) == [
        "iter0256.safetensors",
        "iter0512.safetensors",
    ]
    path = trained / "iter0512.safetensors"
    metadata = read_metadata(path)
    assert metadata["nimg"] == 512 * 4096
    assert metadata["command"] == "python toy_example.py train --cls=A --layers=4 --dim=32 --iterations=512 --seed=0"
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    quality = measure(gt("A"), sample_toy(load_network(path).net, noise))
    assert quality.outliers.value < 0.5 and quality.branch_kl.value < 0.5  # an untrained one: 0.9 and more
    frames = sorted((trained / "frames").iterdir())
    assert [frame.name for frame in frames] == [f"iter{i:04d}.png" for i in range(64, 513, 64)]
    with PIL.Image.open(frames[-1]) as image:
        assert min(image.size) > 500


def test_the_same_seed_gives_the_guide_in_the_repository(trained):
    """Here the weights agree to 3e-6; on other processors, training amplifies their rounding. Another seed: 1.4."""
    ours, guide = (
        torch.cat([p.flatten() for p in load_network(path).net.parameters()])
        for path in (trained / "iter0512.safetensors", GNET)
    )
    assert (ours - guide).norm() < 0.1 * guide.norm()


def test_animation(tmp_path):
    path = tmp_path / "training.gif"
    result = run_cli(main, "train", "--layers=1", "--dim=8", "--iterations=65", f"--save={path}")
    assert result.exit_code == 0, result.output
    with PIL.Image.open(path) as image:
        assert image.n_frames == 2
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("training.toy_figure.SAMPLES", 500)
    monkeypatch.setattr("training.toy_figure.GRID", 40)
    path = tmp_path / f"toy.{suffix}"
    options = ["--guidance=2", "--cfg-guidance=3", "--cls=A", "--seed=1", "--device=cpu"]
    result = run_cli(main, "plot", f"--save={path}", *options)
    assert result.exit_code == 0, result.output
    data = path.read_bytes()
    assert data.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix])
    if suffix == "png":
        with PIL.Image.open(path) as image:
            assert image.size[0] == 1600
            assert image.text["Description"].startswith("python toy_example.py plot --cls=A --seed=1 ")
    elif suffix == "svg":
        assert b"--cfg-guidance=3" in data


@pytest.mark.parametrize("cls", ["A", "B", "AB"])
def test_closeup(monkeypatch, cls):
    """The lower panels look where the class is, and paths start there."""
    from matplotlib.figure import Figure

    monkeypatch.setattr("training.toy_figure.SAMPLES", 1000)
    monkeypatch.setattr("training.toy_figure.GRID", 40)
    (x0, x1), (y0, y1) = box = CLOSEUP[cls]
    x, y = gt(cls).sample(10_000, generator=torch.Generator().manual_seed(0)).T
    assert ((x > x0) & (x < x1) & (y > y0) & (y < y1)).float().mean() > 0.05
    net, gnet, cfg_net = (load_network(path).net for path in (NET, GNET, CFG_NET))
    figure = Figure()
    draw_paper_figure(figure, cls, net, gnet, 2, cfg_net, 2, seed=0)
    upper, lower = figure.axes[:4], figure.axes[4:]
    for axes in upper:
        corners = np.array(axes.lines[0].get_data())
        assert (corners.min(axis=1) == (x0, y0)).all() and (corners.max(axis=1) == (x1, y1)).all()
    assert [(axes.get_xlim(), axes.get_ylim()) for axes in lower] == [box] * 4
    paths = lower[-1].lines
    assert len(paths) == 2 * (TRAJECTORIES + 1)  # without and with guidance; the last of each are the ends
    starts = np.array([path.get_xydata() for path in paths[:TRAJECTORIES]])[:, 0]
    assert (starts > (x0, y0)).all() and (starts < (x1, y1)).all()


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
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == [
        "There is no display to show the figure on; saving it as toy_example.png (choose with --save)",
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


def test_samples_that_overflow(tmp_path):
    """They are outliers, and the file is JSON that any reader takes."""
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
        (["train", "--save=LICENSE"], ["--save=LICENSE: there is a file of that name"]),
        (["plot", f"--cfg-net={NET}"], ["has learned A alone, like --net: it must know both classes"]),
        (["plot", f"--net={NET}", "--cfg-guidance=2"], ["classifier-free guidance beside autoguidance: give --gnet"]),
        (["plot", "--guidance=101"], ["--guidance", "range -100.0<=x<=100.0"]),
        (["plot", "--save=toy.jpeg2"], ["--save=toy.jpeg2", ".png, .pdf, .svg"]),
        (["plot", f"--gnet={NET}"], [f"--gnet={NET} is the same model as --net={NET}: give a worse one, or no --gnet"]),
        (["evaluate", f"--net={NET}", f"--gnet={NET}"], ["is the same model as --net"]),
        (["plot", "--cls=C"], ["--cls", "unknown class 'C'"]),
        (["plot", f"--net={NET}", "--guidance=2"], ["--guidance=2 needs a guiding model: give --gnet"]),
        (["plot", "--cls=B"], ["--cls=B, but", "has learned A"]),
        (["plot", "--guidance=nan"], ["--guidance must be a finite number"]),
        (["plot", "--net=nowhere.safetensors"], ["nowhere.safetensors: no such file"]),
        (["evaluate", "--weights=1,x"], ["--weights", "'1,x' is not a list of numbers"]),
        (["evaluate", "--weights=inf"], ["--weights", "'inf' is not a list of numbers"]),
        (["evaluate", "--samples=1"], ["--samples"]),
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


def test_without_matplotlib(monkeypatch):
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
def test_backend_that_is_not_installed(tmp_path, monkeypatch, error):
    """`plot` ends, as the user asked for a window; `train` goes on and saves its frames."""
    from matplotlib import pyplot

    def fail(**_kwargs):
        raise error("it requires Tornado.")

    monkeypatch.setattr(pyplot, "figure", fail)
    problem = "matplotlib cannot show figures: it requires Tornado. (unset MPLBACKEND, or set it to agg)"
    fails_with(run_cli(main, "plot"), problem)
    result = run_cli(main, "train", "--iterations=1", "--dim=1", f"--save={tmp_path / 'frames'}")
    assert result.exit_code == 0 and f"Note: no window: {problem}" in result.output
    assert [path.name for path in tmp_path.glob("frames/*")] == ["iter0001.png"]


def test_window(monkeypatch):
    """Drawn into while it is open; when the user closes it, training goes on."""
    from matplotlib import pyplot

    drawn: list[int] = []
    figure = pyplot.figure()
    monkeypatch.setattr(figure, "show", lambda: None)
    monkeypatch.setattr(figure.canvas, "draw_idle", lambda: drawn.append(1))
    monkeypatch.setattr(figure.canvas, "flush_events", lambda: pyplot.close(figure) if len(drawn) == 2 else None)
    monkeypatch.setattr("training.toy_figure.new_figure", lambda *_args, **_kwargs: (figure, True))
    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("waits for a window that is closed"))
    result = run_cli(main, "train", "--iterations=256", "--layers=1", "--dim=8")
    assert result.exit_code == 0, result.output
    assert len(drawn) == 2


def test_every_option_is_tested():
    """The options above, by command."""
    tested = {
        "train": {"outdir", "cls", "layers", "dim", "iterations", "seed", "viz", "save", "device"},
        "plot": {"net", "gnet", "cfg_net", "cls", "seed", "device", "offline", "guidance", "cfg_guidance", "save"},
        "evaluate": {"net", "gnet", "cfg_net", "cls", "seed", "device", "offline", "weights", "samples", "json_path"},
    }
    assert {name: {p.name for p in c.params} for name, c in main.commands.items()} == tested
    assert toy_example.__all__ == ["ToyModel", "gt"]


@pytest.mark.parametrize("name", ["README.md", "docs/autoguidance.md"])
def test_tables_show_the_evaluation(name):
    """What the documents say is what docs/toy-evaluation.json holds, rounded."""
    rows = json.loads((ROOT / "docs" / "toy-evaluation.json").read_text())["rows"]
    outliers = {(row["sampling"], row["weight"]): f"{row['outliers']['value']:.2%}" for row in rows}
    lines = [
        line.split("|")[1:] for line in (ROOT / name).read_text().splitlines() if line.startswith("| ") and "%" in line
    ]
    sampling, shown = "", 0
    for cells in ([cell.strip() for cell in line] for line in lines):
        sampling = cells[0] or sampling
        if sampling in {row["sampling"] for row in rows}:
            weight = float(cells[1]) if cells[1] else None
            assert cells[3].split(" ±")[0] + "%" == outliers[sampling, weight]
            shown += 1
    assert shown >= 6


def test_table_shows_the_sweep():
    """What docs/autoguidance.md says of digits is what docs/autoguidance-digits.json holds, rounded."""
    facts = json.loads((ROOT / "docs" / "autoguidance-digits.json").read_text())
    expected = [
        f"| {row['weight']:g} | {100 * row['class_agreement']:.1f} ± {100 * row['class_agreement_error']:.1f} %"
        f" | {row['nn_distance_ratio']:.3f} | {row['diversity']:.0f} |"
        for row in facts["rows"]
    ]
    real = facts["real"]
    expected.append(f"| real digits | {100 * real['class_agreement']:.1f} % | 1 | {real['diversity']:.0f} |")
    text = (ROOT / "docs" / "autoguidance.md").read_text()
    heading, _rule, *table = text[text.index("| w | class as asked for") :].splitlines()
    assert heading.count("|") == 5 and table[: len(expected) + 1] == [*expected, ""]
    assert f"{facts['samples']} samples each" in text and f"All samples are of {facts['steps']} steps" in text
