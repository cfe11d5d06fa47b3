"""train_consistency.py: every option, exact resume, what its snapshots say, and bad input."""

import json
import sys

import PIL.Image
import pytest
import torch
from conftest import (
    DIGITS,
    ROOT,
    assert_all_options,
    fails_with,
    images_in,
    make_dataset,
    random_images,
    run_cli,
    tiny_network,
    tiny_uvit,
)

from calculate_likelihood import main as likelihood
from generate_images import main as generate
from reconstruct_phema import main as reconstruct
from train_consistency import main as train
from train_edm2 import main as train_edm2
from training.config.consistency import CONSISTENCY_PRESETS, ConsistencyTraining
from training.config.score_sde_presets import SCORE_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network, trained_by
from training.snapshot import load_network, save_network

sys.path.insert(0, str(ROOT / "scripts"))

RUN = ["--preset=digits-ect", "--batch=64", "--status=64", "--snapshot=1024", "--checkpoint=1024", "--stage=64", "--preview=0", "--device=cpu"]  # fmt: skip


def saved(net: torch.nn.Module, path) -> str:
    save_network(path, net, StandardRGBEncoder(), {"nimg": 1024}, torch.float32)
    return f"--init-from={path}"


@pytest.fixture
def start(tmp_path) -> str:
    """A network with dropout, whose masks have to come back on resuming."""
    return saved(tiny_network(dropout=0.2), tmp_path / "start.safetensors")


def tune(outdir, *options, data=DIGITS, ok: bool = True):
    result = run_cli(train, f"--outdir={outdir}", f"--data={data}", *RUN, *options)
    assert not ok or result.exit_code == 0, result.output
    return result


def newest_state(run) -> dict:
    return torch.load(max(run.glob("training-state-*.pt")), weights_only=True)


def newest(run) -> str:
    return str(max(run.glob("network-snapshot-*")))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("tuned")
    tune(folder / "run", saved(tiny_network(), folder / "start.safetensors"), "--duration=128")
    return folder / "run"


def test_presets():
    for preset in CONSISTENCY_PRESETS.values():
        config = preset.config
        assert type(config) is ConsistencyTraining and ConsistencyTraining.from_flat(config.flat(), config) == config
        assert trained_by(config).build is not None and preset_network(preset).spec.resolution == preset.resolution
    assert "digits-ect" in run_cli(train, "--list-presets").output


def test_all_options(tmp_path, start):
    args = [
        f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", *RUN, start, "--duration=128", "--P_mean=-0.5", "--P_std=1.2", "--q=3",
        "--k=5", "--stages=3", "--huber=0.1", "--cond-dropout=0.2", "--lr=1e-3", "--decay=100",
    ]  # fmt: skip
    assert run_cli(train, *args).exit_code == 0
    assert_all_options(train, args, but_those_of=train_edm2)
    path = tmp_path / "run" / "training_options.json"
    config = ConsistencyTraining.load(path)
    assert (config.objective.q, config.objective.stages, config.optimizer.lr) == (3, 3, 1e-3)
    assert config.network.dropout == 0.2 and config.data.cond and not config.data.captions
    assert ConsistencyTraining.from_json(config.to_json()) == config
    values = json.loads(path.read_text())
    for network in (None, {"name": "toy.ToyModel"}, {"name": []}, 3):
        path.write_text(json.dumps({**values, "network": network}))
        fails_with(run_cli(train, *args), "not the options of a training run (no network that could be tuned)")


def test_a_run_resumes_exactly_and_without_the_snapshot(tmp_path, start):
    """Over a change of stages, with the dropout masks and the noise of an uninterrupted run."""
    tune(tmp_path / "whole", start, "--duration=192")
    tune(tmp_path / "parts", start, "--duration=64")
    (tmp_path / "start.safetensors").unlink()
    assert "Resuming at 64 images" in tune(tmp_path / "parts", start, "--duration=192").output
    whole, parts = newest_state(tmp_path / "whole"), newest_state(tmp_path / "parts")
    assert whole["nimg"] == parts["nimg"] == 192
    for key, value in whole["net"].items():
        assert torch.equal(parts["net"][key], value), key
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "stage 1" in log and "stage 3" in log
    other = tune(tmp_path / "whole", f"--init-from={tmp_path / 'other.safetensors'}", "--duration=256", ok=False)
    fails_with(other, "was trained with --init-from=")


def test_it_begins_with_the_weights_of_the_snapshot(tmp_path):
    net = tiny_network()
    output = tune(tmp_path / "run", saved(net, tmp_path / "net.safetensors"), "--duration=64", "--lr=1e-30").output
    assert "(100.0% of the values)" in output
    x, labels = torch.randn(3, 1, 8, 8), torch.eye(10)[:3]
    ours = load_network(newest(tmp_path / "run")).net(x, torch.tensor(0.5), labels)
    torch.testing.assert_close(ours, net(x, torch.tensor(0.5), labels), rtol=1e-2, atol=1e-2)  # float16 in the file


def test_snapshots_say_what_they_are(tuned, tmp_path):
    snapshot = load_network(newest(tuned))
    assert snapshot.is_consistency_model and snapshot.metadata["config"]["stage"] == 64
    assert run_cli(reconstruct, f"--indir={tuned}", f"--outdir={tmp_path}", "--outstd=0.07").exit_code == 0
    assert load_network(next(tmp_path.glob("phema-*"))).is_consistency_model
    options = [f"--net={newest(tuned)}", f"--data={DIGITS}", f"--out={tmp_path / 'bpd.json'}"]
    fails_with(run_cli(likelihood, *options), "is no denoiser any more")


def test_images(tuned, tmp_path, snapshot_file):
    """By one and two evaluations; a note where sampler and network do not go together."""
    made = {}
    for levels in ("20", "20,0.8"):
        out = tmp_path / levels
        result = run_cli(
            generate, f"--net={tuned}", f"--outdir={out}", "--seeds=0-3", "--sampler=consistency", f"--sigmas={levels}"
        )
        assert result.exit_code == 0 and "no denoiser" not in result.output and "is none" not in result.output
        record = json.loads((out / "generation.json").read_text())
        assert record["sampler"]["solver"] == "consistency"
        assert record["sampler"]["sigmas"] == [float(level) for level in levels.split(",")]
        made[levels] = images_in(out)
    assert any((made["20"][name] != made["20,0.8"][name]).any() for name in made["20"])
    other = run_cli(generate, f"--net={tuned}", f"--outdir={tmp_path / 'heun'}", "--seeds=0", "--steps=2")
    assert "Note: " in other.output and "is no denoiser any more" in other.output
    plain = run_cli(
        generate, f"--net={snapshot_file}", f"--outdir={tmp_path / 'plain'}", "--seeds=0", "--sampler=consistency"
    )
    assert plain.exit_code == 0 and "--sampler=consistency is for networks of train_consistency.py" in plain.output


def test_table_and_picture_of_the_docs(tuned, tmp_path, snapshot_file):
    from few_steps import main as few_steps

    out = tmp_path / "few.png"
    result = run_cli(few_steps, f"--net={snapshot_file}", f"--tuned={tuned}", f"--out={out}", "--num=250")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if not line.startswith("Note")]
    names = ["real digits", "250 of them", "heun, 63", "sqrt-3m, 6", "sqrt-3m, 2", "consistency, 1", "consistency, 2"]
    assert [row.startswith(name) for row, name in zip(rows[1:], names, strict=True)] == [True] * 7
    with PIL.Image.open(out) as image:
        assert image.width > 500


def test_pictures_and_metrics_of_a_run_are_by_consistency_sampling(tmp_path, start, digits_ref):
    options = [
        "--preview=1024",
        "--preview-images=4",
        "--metrics=fd_pixels",
        f"--metrics-ref={digits_ref}",
        "--metrics-num=8",
    ]
    tune(tmp_path / "run", start, "--duration=64", *options)
    assert (tmp_path / "run" / "fakes-0000000.png").exists()
    (record,) = map(json.loads, (tmp_path / "run" / "metric-fd_pixels.jsonl").read_text().splitlines()[:1])
    assert record["sampler"]["solver"] == "consistency"


def test_a_uvit(tmp_path):
    """Of EDM's preconditioning; one that predicts the noise is refused."""
    start = saved(tiny_uvit(prediction="edm"), tmp_path / "edm.safetensors")
    tune(tmp_path / "run", start, "--duration=64")
    assert load_network(newest(tmp_path / "run")).is_consistency_model
    noise = saved(tiny_uvit(prediction="noise"), tmp_path / "noise.safetensors")
    fails_with(tune(tmp_path / "noise", noise, ok=False), "a network of U-ViT without EDM's preconditioning")


def test_without_classes(tmp_path):
    start = saved(tiny_network(label_dim=0), tmp_path / "start.safetensors")
    tune(tmp_path / "run", start, "--duration=64")
    assert not ConsistencyTraining.load(tmp_path / "run" / "training_options.json").data.cond


def test_bad_input(tmp_path, start, nvae):
    score = saved(preset_network(SCORE_PRESETS["digits-vp"]), tmp_path / "vp.safetensors")
    rgb = make_dataset(tmp_path / "rgb.zip", random_images(2), {"00000/img00000000.png": 1, "00000/img00000001.png": 2})
    larger = make_dataset(tmp_path / "large.zip", random_images(2, 16, None), {"00000/img00000000.png": 9, "00000/img00000001.png": 2})  # fmt: skip
    few = make_dataset(tmp_path / "few.zip", random_images(2, 8, None), {"00000/img00000000.png": 1, "00000/img00000001.png": 2})  # fmt: skip
    for options, data, message in [
        ([], DIGITS, "which network is to be tuned? Give its snapshot by --init-from"),
        ([score], DIGITS, "holds a network of score-SDE without EDM's preconditioning"),
        ([f"--init-from={nvae}"], DIGITS, "holds a network of NVAE without EDM's preconditioning"),
        ([f"--init-from={tmp_path / 'nowhere.safetensors'}"], DIGITS, "nowhere.safetensors"),
        ([start], rgb, "has channels 3, and the network of --init-from="),
        ([start], larger, "has resolution 16, and the network of --init-from="),
        ([start], few, "has conditions of the shape (3,), and the network of --init-from="),
        ([start, "--huber=0"], DIGITS, "--huber must be positive, not 0.0"),
        ([start, "--q=1"], DIGITS, "--q must be more than 1, not 1.0"),
    ]:
        fails_with(tune(tmp_path / "run", *options, data=data, ok=False), message)
        assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(run, start):
    fails_with(tune(run, start, ok=False), "those of train_edm2.py", "choose another --outdir")
