"""train_nvae.py: every option, presets, resuming, steps that are not finite, and bad input."""

import json
import shutil

import pytest
import torch
from conftest import DIGITS, ROOT, assert_all_options, fails_with, make_dataset, random_images, run_cli, torchrun

from calculate_metrics import main as metrics_tool
from dnnlib.errors import UserError
from generate_images import main as generate
from train_edm2 import main as train_edm2
from train_nvae import main as train
from training.conditioning import DataSpec
from training.config.data import DatasetInfo
from training.config.nvae import ARCH_INSTANCES, TRAINING_PRESETS, NVAETraining
from training.families import preset_network, trained_by
from training.generation import generate_images
from training.networks.nvae_cells import ARCHITECTURES
from training.optimizers import AdamaxOptimizer
from training.samplers import StackedRandomGenerator
from training.snapshot import load_network

SMALL = [
    "--preset=digits-nvae",
    "--num_channels_enc=4",
    "--num_channels_dec=4",
    "--num_groups_per_scale=1",
    "--duration=2048",
    "--batch=128",
    "--status=256",
    "--snapshot=2048",
    "--checkpoint=1024",
    "--preview=0",
    "--device=cpu",
]


def run_training(outdir, *options):
    result = run_cli(train, f"--outdir={outdir}", f"--data={DIGITS}", *SMALL, *options)
    assert result.exit_code == 0, result.output
    return result


def state_of(outdir) -> dict:
    return torch.load(max(outdir.glob("training-state-*.pt")), weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    outdir = tmp_path_factory.mktemp("nvae") / "run"
    run_training(outdir)
    return outdir


def test_names_of_architectures():
    assert set(ARCHITECTURES) == set(ARCH_INSTANCES)


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] * (len(name) > 11)) for name in TRAINING_PRESETS]
)
def test_presets_dry_run(preset, tmp_path):
    chosen = TRAINING_PRESETS[preset]
    images = random_images(1, chosen.resolution, chosen.channels if chosen.channels > 1 else None)
    data = make_dataset(tmp_path / "data.zip", images)
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", f"--preset={preset}", "-n")
    assert result.exit_code == 0, result.output
    assert "Dry run; exiting." in result.output and not (tmp_path / "run").exists()


def test_all_training_options(tmp_path):
    ref = tmp_path / "ref.safetensors"
    options = [f"--data={DIGITS}", f"--dest={ref}", "--metrics=fd_pixels", "--workers=0"]
    assert run_cli(metrics_tool, "ref", *options).exit_code == 0
    args = [
        f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits-nvae", "--xflip=1", "--cache=1", "--verify=0", "--workers=1",
        "--decoder=normal", "--levels=32", "--pad=4", "--published-decoder=1", "--arch_instance=res_bnswish",
        "--num_latent_scales=2", "--num_groups_per_scale=2", "--num_latent_per_group=3", "--ada_groups=0",
        "--min_groups_per_scale=2", "--num_channels_enc=4", "--num_channels_dec=8", "--num_preprocess_blocks=2",
        "--num_preprocess_cells=1", "--num_cell_per_cond_enc=2", "--num_postprocess_blocks=2",
        "--num_postprocess_cells=1", "--num_cell_per_cond_dec=2", "--num_mixture_dec=3", "--num_nf=1", "--use_se=0",
        "--res_dist=0", "--kl_anneal_portion=0.5", "--kl_const_portion=0.1", "--kl_const_coeff=0.01",
        "--weight_decay_norm=0.1", "--weight_decay_norm_init=1", "--weight_decay_norm_anneal=1", "--lr=0.02",
        "--learning_rate_min=0.001", "--warmup_portion=0.1", "--weight_decay=0.001", "--ema-std=0.1", "--duration=64",
        "--batch=32", "--batch-gpu=16", "--device=cpu", "--precision=fp32", "--fp16=0", "--ls=2", "--bench=0",
        "--compile=0", "--checkpoint-activations=0", "--status=32", "--snapshot=1024", "--preview=1024",
        "--preview-images=4", "--preview-steps=2", "--checkpoint=1024", "--metrics=fd_pixels",
        f"--metrics-ref={ref}", "--metrics-num=2", "--on-divergence=warn", "--seed=3", "--resume",
    ]  # fmt: skip
    result = run_cli(train, *args)
    assert result.exit_code == 0, result.output
    assert_all_options(train, args, but_those_of=train_edm2)
    names = {f"fakes-0000000{name}.png" for name in ("", "-reconstructions", "-t0.7", "-t0.8", "-t0.9")}
    assert {path.name for path in tmp_path.glob("fakes-*")} == names
    config = NVAETraining.load(tmp_path / "training_options.json")
    assert config.network.num_channels_dec == 8 and config.optimizer.warmup_portion == 0.1
    net = load_network(tmp_path / "network-snapshot-0000000-0.100.safetensors").net
    assert net.img_resolution == 16 and net.spec.resolution == 8 and net.decoder.levels == 32


def test_resume_is_exact(trained, tmp_path):
    """With annealing, power iterations and running statistics under way."""
    parts = tmp_path / "parts"
    shutil.copytree(trained, parts)
    newest = max(parts.glob("training-state-*.pt"))
    newest.unlink()
    assert state_of(parts)["nimg"] == 1024
    run_training(parts)
    whole, parts = state_of(trained), state_of(parts)
    for part in ("net", "objective"):
        assert all(torch.equal(parts[part][key], value) for key, value in whole[part].items())
    for moment in ("exp_avg", "exp_inf"):
        theirs = whole["optimizer"][moment]
        assert all(torch.equal(parts["optimizer"][moment][key], value) for key, value in theirs.items())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with a run of two processes for each of two architectures: the second one's scales depend on data."""
    folder = tmp_path_factory.mktemp("two")
    runs = [["--arch_instance=res_mbconv"], ["--arch_instance=res_elu"]]
    options = [*SMALL, f"--data={DIGITS}", "--duration=512"]
    commands = [[f"--outdir={folder / name[0].split('=')[1]}", *options, *name] for name in runs]
    (folder / "script.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom train_nvae import main\n"
        f"for args in {commands!r}:\n    main(args, standalone_mode=False)\n"
    )
    done = torchrun(2, folder / "script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x cpu, 1 round of 64 images") == 2
    return folder


@pytest.mark.parametrize("architecture", ["res_mbconv", "res_elu"])
def test_two_processes_equal_one(two_processes, architecture, tmp_path):
    """To rounding: with batch norms of both processes' images, and scales that the first batch of both chooses."""
    run_training(tmp_path, "--duration=512", f"--arch_instance={architecture}")
    one, two = state_of(tmp_path), state_of(two_processes / architecture)
    for key, value in one["net"].items():
        torch.testing.assert_close(
            two["net"][key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_log_and_snapshot(trained):
    fields = [json.loads(line) for line in (trained / "stats.jsonl").read_text().splitlines()]
    assert fields[0]["beta"] < fields[-1]["beta"] == 1
    assert {"kl_00", "kl_01", "active_units", "lambda", "bpd", "recon", "spectral_norms"} <= fields[-1].keys()
    assert "active_units" in (trained / "log.txt").read_text()
    assert [path.name for path in trained.glob("network-*")] == ["network-snapshot-0000002.safetensors"]


@pytest.mark.parametrize("options", [[], ["--temperature=0.7", "--readjust-bn=2", "--pixels=draw"]])
def test_generated_images(trained, tmp_path, options):
    net = f"--net={trained / 'network-snapshot-0000002.safetensors'}"
    for outdir, batch in [("together", 4), ("alone", 1)]:
        result = run_cli(generate, net, f"--outdir={tmp_path / outdir}", "--seeds=0-3", f"--batch={batch}", *options)
        assert result.exit_code == 0, result.output
    together, alone = ([path.read_bytes() for path in sorted((tmp_path / d).iterdir())] for d in ("together", "alone"))
    assert together == alone and len(set(together)) > 1


def test_from_python(trained):
    net = load_network(trained / "network-snapshot-0000002.safetensors").net
    warm, cold = (
        next(iter(generate_images(net, seeds=[3, 4], verbose=False, temperature=t))).images for t in (1.0, 0.5)
    )
    assert warm.shape == (2, 1, 8, 8) and not torch.equal(warm, cold)
    with pytest.raises(UserError, match="unknown option 'num_steps'"):
        generate_images(net, num_steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=0"], "--temperature must be positive"),
        (["--temperature=nan"], "--temperature must be a finite number"),
        (["--steps=5"], "--steps has no meaning for NVAE"),
        (["--class=1"], "knows no classes"),
        (["--guidance=2", "--gnet=x.safetensors"], "--guidance has no meaning for NVAE"),
    ],
)
def test_sampling_options_that_do_not_fit(trained, tmp_path, options, message):
    net = f"--net={trained / 'network-snapshot-0000002.safetensors'}"
    fails_with(run_cli(generate, net, f"--outdir={tmp_path}", *options), message)


def test_denoisers_have_no_temperature(snapshot_file, tmp_path):
    result = run_cli(generate, f"--net={snapshot_file}", f"--outdir={tmp_path}", "--temperature=0.7")
    fails_with(result, "--temperature has no meaning for EDM2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_latent_scales=4"], "cannot be halved 4 times"),
        (["--batch=64", "--batch-gpu=1"], "batch norm needs at least two images"),
        (["--num_postprocess_blocks=2"], "must be equal"),
        (["--learning_rate_min=0.5"], "--learning_rate_min=0.5 is above --lr"),
        (["--weight_decay_norm=0", "--weight_decay_norm_anneal=1"], "needs --weight_decay_norm above 0"),
        (["--checkpoint-activations=1"], "count each image twice"),
        (["--num_groups_per_scale=128", "--num_cell_per_cond_dec=16"], "more than 1024"),
        (["--num_preprocess_blocks=8", "--num_postprocess_blocks=8", "--num_channels_enc=1024"], "more than 16384"),
        (["--arch_instance=res"], "is not one of"),
        (["--ema-std=2"], "--ema-std"),
    ],
)
def test_bad_input(tmp_path, options, message):
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits-nvae", "-n", *options)
    fails_with(result, message)


def test_advice_for_small_batches(tmp_path):
    options = [f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits-nvae", "--status=0", "-n"]
    advice = "Note: --lr=0.01 was chosen for batches of 64: with --batch=16, the square root rule gives --lr=0.005"
    assert advice in run_cli(train, *options, "--batch=16").output
    for others in (["--batch=16", "--lr=0.004"], ["--batch=64"]):
        assert "square root rule" not in run_cli(train, *options, *others).output


def test_images_that_decoders_cannot_take(tmp_path):
    data = make_dataset(tmp_path / "data.zip", random_images(2))
    options = [f"--outdir={tmp_path / 'run'}", f"--data={data}", "--preset=digits-nvae-binary", "-n"]
    fails_with(run_cli(train, *options), "--decoder=bernoulli is for images of one channel, not 3")


# ---------------------------------------------------------------------------------------------------------
# Steps that are not finite


@pytest.fixture
def optimizer():
    preset = TRAINING_PRESETS["digits-nvae"]
    info = DatasetInfo(count=1, resolution=8, channels=1, label_dim=0, content_hash="")
    config = NVAETraining.from_flat({"ls": 4.0, "warmup_portion": 0.0}, preset.config)
    assert trained_by(config).training is NVAETraining and info.resolution == preset.resolution
    torch.manual_seed(0)
    return AdamaxOptimizer(preset_network(preset), config)


@pytest.mark.parametrize("architecture", ARCH_INSTANCES)
def test_every_architecture_takes_a_step(architecture):
    small = {"arch_instance": architecture, "num_channels_enc": 8, "num_channels_dec": 8, "warmup_portion": 0.0}
    config = NVAETraining.from_flat(small, TRAINING_PRESETS["digits-nvae"].config)
    torch.manual_seed(0)
    entry = trained_by(config)
    net = entry.build(config.network, DataSpec(channels=1, resolution=8)).train()
    assert entry.objective is not None and entry.optimizer is not None
    objective, optimizer = entry.objective(net, config), entry.optimizer(net, config)
    before = net.stem.weight.clone()
    optimizer.zero_gradients()
    with entry.step(net):
        loss = objective(net, torch.rand(4, 1, 8, 8) * 2 - 1, None, rnd=StackedRandomGenerator("cpu", range(4)), nimg=0)
        (loss.mean() + objective.regularizer(net, 0)).backward()
    optimizer.step(0)
    assert int(optimizer.nonfinite) == 0 and not torch.equal(net.stem.weight, before)


def forward_backward(optimizer: AdamaxOptimizer, scale: float = 1) -> None:
    optimizer.zero_gradients()
    out = optimizer.net.train()(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * scale)
    (optimizer.loss_scaling * out.logits.square().mean()).backward()


def test_steps_that_are_not_finite_change_nothing(optimizer):
    forward_backward(optimizer)
    optimizer.step(0)
    before = {key: value.clone() for key, value in optimizer.net.state_dict().items()}
    forward_backward(optimizer, scale=float("nan"))
    optimizer.step(64)
    changed = {key for key, value in optimizer.net.state_dict().items() if not torch.equal(value, before[key])}
    assert all(key.endswith("num_batches_tracked") for key in changed)
    assert int(optimizer.nonfinite) == 1 and optimizer.loss_scaling == 4
    first = "the input of pre_process.0._ops.0.bn_act at 64 images"
    assert optimizer.describe_nonfinite(1) == f"1 steps with non-finite gradients were skipped, first in {first}"
    optimizer.zero_gradients()
    optimizer.net.stem.weight.grad.fill_(float("inf"))
    optimizer.step(128)
    assert "the gradients of stem at 128" in optimizer.describe_nonfinite(1)


def test_weights_are_adamax(optimizer):
    """The same as torch's optimiser on the parameters one by one."""
    reference = preset_network(TRAINING_PRESETS["digits-nvae"])
    reference.load_state_dict(optimizer.net.state_dict())
    adamax = torch.optim.Adamax(reference.parameters(), lr=0.01, eps=1e-3, weight_decay=3e-4)
    for nimg in (0, 1024):
        forward_backward(optimizer)
        for ours, theirs in zip(optimizer.net.parameters(), reference.parameters(), strict=True):
            theirs.grad = ours.grad / 4
        optimizer.step(nimg)
        for group in adamax.param_groups:
            group["lr"] = optimizer.learning_rate(nimg)
        adamax.step()
    for ours, theirs in zip(optimizer.net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_loss_scaling_of_float16(optimizer):
    net = optimizer.net
    net.precision = "fp16"
    config = TRAINING_PRESETS["digits-nvae"].config
    scaled = AdamaxOptimizer(net, config)
    assert scaled.loss_scaling == 1024
    scaled.gradients.fill_(float("inf"))
    scaled.step(0)
    assert scaled.loss_scaling == 512
    scaled.good_steps = 1999
    scaled.gradients.zero_()
    scaled.step(64)
    assert scaled.loss_scaling == 1024
    again = AdamaxOptimizer(net, config)
    scaled.gradients.fill_(float("nan"))
    scaled.step(64)
    again.load_state_dict(scaled.state_dict())
    assert again.loss_scaling == 512
