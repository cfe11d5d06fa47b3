"""train_uvit.py: every option, every preset, and bad input."""

import sys

import PIL.Image
import pytest
import torch
from conftest import DIGITS, ROOT, assert_all_options, fails_with, make_dataset, npy, random_images, run_cli

from dataset_tool import main as dataset_tool
from generate_images import main as generate
from train_edm2 import main as train_edm2
from train_uvit import main as train
from training.config.uvit import UViTTraining
from training.config.uvit_presets import UVIT_PRESETS
from training.conversion.captions import add_captions
from training.dataset.images import ImageFolderDataset
from training.encoders import WordEncoder
from training.families import preset_network, trained_by
from training.flops import count_parameters
from training.networks.uvit_denoiser import uvit_schedule
from training.preconditioning import Epsilon
from training.samplers.grids import grid_for
from training.samplers.sampler import Sampler
from training.snapshot import load_network

sys.path.insert(0, str(ROOT / "scripts"))

SMALL = ["--embed-dim=16", "--depth=3", "--num-heads=2", "--precision=fp32", "--device=cpu"]
RUN = [
    "--duration=128", "--batch=64", "--batch-gpu=32", "--status=64", "--snapshot=1024", "--checkpoint=1024", "--seed=3", "--preview=0",
]  # fmt: skip
NETWORK = [
    "--patch-size=4", "--mlp-ratio=2", "--qkv-bias=1", "--mlp-time-embed=1", "--null-class=1", "--conv=0", "--skip=1", "--skip-norm=1",
    "--noise-schedule=cosine", "--predict=data", "--sigma-data=0.6",
]  # fmt: skip
TRAINING = [
    "--cond-dropout=0.3", "--noise-levels=lognormal", "--P_mean=-0.5", "--P_std=1.2", "--lr=1e-3", "--beta1=0.8", "--beta2=0.9",
    "--weight-decay=0.01", "--decay-exclude-embeddings=1", "--warmup=64", "--decay-to=128", "--grad-clip=0.5", "--ema-rate=0.9",
    "--ema-std=0.05",
]  # fmt: skip
# Parameters of the published networks, from the published code.
PARAMETERS = {
    "cifar10_uvit_small": 44_255_328,
    "celeba64_uvit_small": 44_292_228,
    "imagenet64_uvit_mid": 130_940_292,
    "imagenet64_uvit_large": 286_827_652,
    "imagenet256_uvit_large": 286_763_172,
    "imagenet256_uvit_huge": 500_832_016,
    "imagenet512_uvit_large": 286_861_524,
    "imagenet512_uvit_huge": 500_942_656,
    "mscoco_uvit_small": 44_692_644,
    "mscoco_uvit_small_deep": 58_345_636,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_numbers_of_parameters(preset):
    with torch.device("meta"):
        assert count_parameters(preset_network(UVIT_PRESETS[preset])) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", UVIT_PRESETS)
def test_presets_dry_run(preset, tmp_path):
    wanted = UVIT_PRESETS[preset]
    if wanted.resolution == 8:
        data = DIGITS
    elif wanted.channels == 3:
        data = make_dataset(
            tmp_path / "data.zip", random_images(1, size=wanted.resolution), {"00000/img00000000.png": 0}
        )
    else:
        latents = torch.randn(wanted.channels, wanted.resolution, wanted.resolution).numpy()
        data = make_dataset(tmp_path / "data.zip", {"0.npy": npy(latents)}, {"0.npy": 0})
    if wanted.context[0]:
        plain, data = data, tmp_path / "captions.zip"
        texts = ["x"] * len(ImageFolderDataset(plain))
        add_captions(ImageFolderDataset(plain), data, [(text,) for text in texts], WordEncoder(*wanted.context))
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", f"--preset={preset}", "-n")
    assert result.exit_code == 0, result.output
    assert "Dry run; exiting." in result.output


def test_all_options(tmp_path):
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits-uvit", *SMALL, *RUN, *NETWORK, *TRAINING]
    result = run_cli(train, *args)
    assert result.exit_code == 0, result.output
    assert_all_options(train, [*args, "--captions=0"], but_those_of=train_edm2)
    flat = UViTTraining.load(tmp_path / "training_options.json").flat()
    assert (flat["predict"], flat["noise_schedule"], flat["embed_dim"]) == ("data", "cosine", 16)
    assert (flat["decay_to"], flat["grad_clip"], flat["ema_rate"], flat["P_std"]) == (128, 0.5, 0.9, 1.2)
    names = sorted(path.name[24:-12] for path in tmp_path.glob("network-*"))
    assert names == ["-0.050", "-ema"]
    net = load_network(tmp_path / "network-snapshot-0000000-ema.safetensors").net
    assert net.spec.conditioning.optional and net.net.label_emb.num_embeddings == 11
    assert net.net.final_layer is None and net.net.mid_block.attn.qkv.bias is not None


@pytest.mark.parametrize("rate", [0, 0.9])
def test_without_classes(tmp_path, rate):
    result = run_cli(
        train, f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits-uvit", *SMALL, *RUN, "--cond=0", "--cond-dropout=0",
        f"--ema-rate={rate}", "--decay-to=0", "--predict=noise", "--noise-schedule=discrete",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("network-*-ema.safetensors"))) == (rate > 0)
    net = load_network(tmp_path / "network-snapshot-0000000-0.050.safetensors").net
    assert net.net.label_emb is None and not net.spec.conditioning.optional


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--embed-dim=66"], "--embed-dim=66 is not a multiple of --num-heads=4"),
        (["--patch-size=3"], "img_size 8 is not a multiple of patch_size 3"),
        (["--null-class=0"], "--cond-dropout=0.1 needs a class that stands for none"),
        (["--decay-to=100"], "--decay-to=100 must be after --warmup=3200"),
        (["--predict=velocity"], "'velocity' is not one of 'noise', 'data', 'edm'"),
        (["--depth=1000"], "--depth must be at most 256"),
    ],
)
def test_bad_options(tmp_path, options, message):
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits-uvit", *options, "-n")
    fails_with(result, message)
    assert not (tmp_path / "run").exists()


def test_a_longer_run_than_the_learning_rate_is_for(tmp_path):
    args = [f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits-uvit", "--duration=1Mi", "-n"]
    assert "Note: the learning rate is 0 from 147456 images on" in run_cli(train, *args).output


class Gaussian:
    """The denoiser of normal data with standard deviation 0.5."""

    def __init__(self, preset: str):
        self.preconditioning = Epsilon(uvit_schedule(UVIT_PRESETS[preset].config.network))
        self.sigma_min, self.sigma_max = self.preconditioning.sigma_min, self.preconditioning.sigma_max

    def __call__(self, x, sigma, cond=None):
        return 0.25 * x / (0.25 + sigma**2)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [("imagenet64_uvit_mid", 0.5002525), ("imagenet256_uvit_large", 0.5002525), ("imagenet256_uvit_huge", 0.5090439)],
)
def test_samplers_of_presets_are_the_published_ones(preset, wanted):
    """Values of the published DPM-Solver and DPM-Solver++ with 50 evaluations, begun at 1."""
    D, config = Gaussian(preset), UVIT_PRESETS[preset].sampler
    sampler = Sampler(config, grid_for(config, D))
    x = sampler(D, torch.ones(1, 1, 1, 1), dtype=torch.float64)
    assert sampler.nfe == 50
    assert x.item() == pytest.approx(wanted, rel=1e-4)


def test_embeddings_can_be_left_out_of_the_decay():
    config = UVIT_PRESETS["digits-uvit"].config
    for exclude in (False, True):
        chosen = UViTTraining.from_flat({"decay_exclude_embeddings": exclude, "weight_decay": 0.5}, config)
        net = preset_network(UVIT_PRESETS["digits-uvit"])
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = trained_by(chosen).optimizer(net, chosen)
        optimizer.zero_gradients()
        optimizer.step(chosen.optimizer.warmup)
        factor = 1 - 0.5 * chosen.optimizer.lr
        for name, p in net.named_parameters():
            kept = exclude and name in ("net.pos_embed", "net.label_emb.weight")
            torch.testing.assert_close(p.detach(), before[name] * (1 if kept else factor))
        state = optimizer.state_dict()
        trained_by(chosen).optimizer(preset_network(UVIT_PRESETS["digits-uvit"]), chosen).load_state_dict(state)


def test_digits_in_latents_of_their_own_autoencoder(tmp_path):
    """The commands of docs/uvit.md, in small: an autoencoder, latents, a model of them, pictures."""
    pytest.importorskip("diffusers")
    from digits_autoencoder import main as digits_autoencoder

    rgb, vae, latents, run = (tmp_path / name for name in ("rgb.zip", "vae", "latents.zip", "run"))
    convert = ["convert", f"--source={DIGITS}", f"--dest={rgb}", "--max-images=20", "--workers=1"]
    for command, arguments in [
        (dataset_tool, convert),
        (digits_autoencoder, [f"--data={rgb}", f"--outdir={vae}", "--steps=2"]),
        (dataset_tool, ["encode", f"--source={rgb}", f"--dest={latents}", f"--encoder={vae}", "--device=cpu"]),
        (train, [f"--outdir={run}", f"--data={latents}", "--preset=digits-uvit-latent", *SMALL, *RUN]),
    ]:
        result = run_cli(command, *arguments)
        assert result.exit_code == 0, result.output
    net = run / "network-snapshot-0000000-ema.safetensors"
    assert load_network(net).net.spec.shape == (4, 4, 4)
    result = run_cli(generate, f"--net={net}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--class=7", "--steps=2")
    assert result.exit_code == 0, result.output
    with PIL.Image.open(tmp_path / "out" / "000000.png") as image:
        assert image.size == (8, 8) and image.mode == "RGB"
    fails_with(run_cli(digits_autoencoder, f"--data={DIGITS}", f"--outdir={vae}"), "has 1 channels, not 3")
