"""train_score_sde.py: every option, every preset, and bad input."""

import pytest
from conftest import DIGITS, assert_all_options, fails_with, make_dataset, random_images, run_cli

from train_edm2 import main as train_edm2
from train_score_sde import main as train
from training.config.score_sde import ScoreTraining
from training.config.score_sde_presets import SCORE_PRESETS
from training.snapshot import load_network

SMALL = ["--nf=8", "--ch-mult=1,2", "--num-res-blocks=1", "--attn-resolutions=none", "--precision=fp32", "--device=cpu"]
RUN = [
    "--duration=128", "--batch=64", "--batch-gpu=32", "--status=64", "--snapshot=1024", "--checkpoint=1024", "--seed=3", "--preview=0",
]  # fmt: skip
NETWORK = [
    "--sde=vp", "--continuous=1", "--sigma-min=0.02", "--sigma-max=4", "--beta-min=0.2", "--beta-max=15", "--num-scales=500",
    "--model=ncsnpp", "--dropout=0.1", "--resamp-with-conv=1", "--conditional=1", "--fir=1", "--skip-rescale=1", "--resblock-type=biggan",
    "--progressive=output_skip", "--progressive-input=input_skip", "--progressive-combine=cat", "--embedding-type=positional",
    "--fourier-scale=2", "--nonlinearity=elu", "--centered=1", "--scale-by-sigma=0",
]  # fmt: skip
TRAINING = [
    "--reduce-mean=1", "--likelihood-weighting=1", "--importance-sampling=1", "--dequantize=1", "--lr=1e-3", "--beta1=0.8",
    "--weight-decay=0.01", "--warmup=64", "--decay-from=64", "--decay-to=128", "--grad-clip=0.5", "--ema-rate=0.9", "--ema-std=0.05",
]  # fmt: skip


@pytest.mark.parametrize("preset", SCORE_PRESETS)
def test_presets_dry_run(preset, tmp_path):
    size = SCORE_PRESETS[preset].resolution
    data = DIGITS if size == 8 else make_dataset(tmp_path / "data.zip", random_images(1, size=size))
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", f"--preset={preset}", "-n")
    assert result.exit_code == 0, result.output
    assert "Dry run; exiting." in result.output


def test_all_options(tmp_path):
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits-vp", *SMALL, *RUN, *NETWORK, *TRAINING]
    result = run_cli(train, *args)
    assert result.exit_code == 0, result.output
    assert_all_options(train, [*args, "--refine-plan=64"], but_those_of=train_edm2)
    flat = ScoreTraining.load(tmp_path / "training_options.json").flat()
    assert (flat["sde"], flat["beta_max"], flat["nf"], flat["importance_sampling"]) == ("vp", 15, 8, True)
    assert (flat["decay_from"], flat["decay_to"], flat["grad_clip"], flat["ema_rate"]) == (64, 128, 0.5, 0.9)
    assert sorted(path.name for path in tmp_path.glob("network-*")) == [
        f"network-snapshot-0000000{suffix}.safetensors" for suffix in ("-0.050", "-ema")
    ]
    snapshot = load_network(tmp_path / "network-snapshot-0000000-ema.safetensors")
    assert snapshot.net.preconditioning.schedule.beta_max == 15 and snapshot.net.spec.pixel_range == (-1, 1)


@pytest.mark.parametrize("model", ["ddpm", "ncsn", "ncsnv2"])
@pytest.mark.parametrize("rate", [0, 0.9])
def test_other_networks(tmp_path, model, rate):
    options = [f"--model={model}", "--continuous=0", "--num-scales=20", "--nf=8", "--duration=128", "--batch=64"]
    intervals = [
        "--status=64",
        "--snapshot=0",
        "--checkpoint=0",
        "--preview=0",
        "--decay-to=0",
        "--embedding-type=fourier",
    ]
    data = make_dataset(tmp_path / "data.zip", random_images(64, size=16))
    if model == "ddpm":
        options += ["--nf=32", "--num-res-blocks=1"]
    result = run_cli(
        train, f"--outdir={tmp_path}", f"--data={data}", f"--preset=ve/{'cifar10_ddpm' if model == 'ddpm' else f'{model}/cifar10'}",
        *options, *intervals, f"--ema-rate={rate}", "--device=cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = sorted(path.name[24:-12] for path in tmp_path.glob("network-*"))
    assert names == ["-0.050", "-0.100", *(["-ema"] if rate else [])]
    snapshot = load_network(tmp_path / "network-snapshot-0000000-0.100.safetensors")
    assert type(snapshot.net.net).__name__.lower() == model and snapshot.encoder.init_kwargs == {"low": 0, "high": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cond=1"], "networks of score-SDE models know no classes"),
        (["--sigma-min=7"], "--sigma-min=7 must be below --sigma-max=5"),
        (["--sde=subvp", "--continuous=0"], "sub-VP has no noise levels of its own"),
        (["--sde=vp", "--continuous=0", "--num-scales=20"], "--num-scales=20 is too few for --beta-max=20"),
        (["--sde=vp", "--beta-min=30"], "--beta-min=30 must not be above --beta-max=20"),
        (["--model=ncsnv2"], "--model=ncsnv2 numbers noise levels: it needs --sde=ve --continuous=0"),
        (["--embedding-type=positional"], "with --sde=ve it needs --continuous=0"),
        (["--model=ddpm", "--continuous=0"], "--progressive-input has no effect with --model=ddpm: leave it out"),
        (["--likelihood-weighting=1", "--continuous=0", "--embedding-type=positional"], "needs continuous times"),
        (["--importance-sampling=1"], "--importance-sampling=1 needs --likelihood-weighting=1"),
        (["--decay-to=1000"], "must be in order"),
        (["--ch-mult=1,2,2,2,2"], "resolution 8 is not divisible by 16"),
    ],
)
def test_bad_options(tmp_path, options, message):
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits-ve", *options, "-n")
    fails_with(result, message)
    assert not (tmp_path / "run").exists()
