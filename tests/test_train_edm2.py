"""train_edm2.py: every option, every preset, and bad input."""

import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import (
    DIGITS,
    ROOT,
    TINY,
    assert_all_options,
    fails_with,
    make_dataset,
    npy,
    png,
    random_images,
    run_cli,
)

from calculate_metrics import main as metrics_tool
from train_edm2 import main as train
from training.config.edm2 import TRAINING_PRESETS, EDM2Training
from training.snapshot import load_network

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.mark.parametrize("preset", TRAINING_PRESETS)
def test_presets_dry_run(preset, tmp_path):
    images = random_images(1, size=TRAINING_PRESETS[preset].resolution)
    data = DIGITS if preset == "digits" else make_dataset(tmp_path / "data.zip", images)
    result = run_cli(
        train,
        f"--outdir={tmp_path / 'run'}",
        f"--data={data}",
        f"--cond={int(preset == 'digits')}",
        f"--preset={preset}",
        "-n",
    )
    assert result.exit_code == 0, result.output
    assert "Dry run; exiting." in result.output
    assert not (tmp_path / "run").exists()


def test_all_training_options(tmp_path):
    ref = tmp_path / "ref.safetensors"
    options = [f"--data={DIGITS}", f"--dest={ref}", "--metrics=fd_pixels", "--workers=0"]
    assert run_cli(metrics_tool, "ref", *options).exit_code == 0
    args = [
        f"--outdir={tmp_path}", f"--data={DIGITS}", "--cond=1", "--preset=digits", "--duration=64", "--batch=32", "--channels=8",
        "--dropout=0.1", "--P_mean=-0.8", "--P_std=1.6", "--lr=0.02", "--decay=100", "--batch-gpu=16", "--fp16=1", "--ls=2",
        "--bench=0", "--status=32", "--snapshot=1024", "--checkpoint=1024", "--seed=3", "--precision=fp32", "--device=cpu",
        "--channel-mult=1,2", "--num-blocks=2", "--attn-resolutions=4", "--noise-embedding=fourier", "--noise-bandwidth=0.5", "--ema-std=0.01,0.02,...,0.04", "--workers=1", "--resume", "--xflip=1", "--cache=1", "--verify=0",
        "--metrics=fd_pixels", f"--metrics-ref={ref}", "--metrics-num=2", "--compile=0",
        "--checkpoint-activations=1", "--preview=1024", "--preview-images=7", "--preview-steps=3", "--on-divergence=warn", "--timeout=5",
        "--checkpoint-minutes=9", "--shard=1", "--keep-checkpoints=3", "--milestones=2048", "--slice=4096", "--max-time=1",
        "--dropout-masks=round", "--on-nonfinite=skip",
    ]  # fmt: skip
    result = run_cli(train, *args)
    assert result.exit_code == 0, result.output
    # The others are tested in test_latent_provenance.py, snapshot/test_initial.py, test_sharding.py, planning/, monitoring/.
    assert_all_options(
        train,
        [*args, "-n", "--list-presets", "--encoder=x", "--trust-encoder=1", "--init-from=x", "--tracker=none"]
        + ["--val-data=x", "--val-images=1", "--val-fraction=0.1", "--diagnose=1", "--plan", "--shard=1"],
    )
    config = EDM2Training.load(tmp_path / "training_options.json")
    expected = dict(
        cond=True, preset="digits", duration=64, batch=32, channels=8, dropout=0.1, P_mean=-0.8, P_std=1.6, lr=0.02, decay=100,
        batch_gpu=16, ls=2, bench=False, status=32, snapshot=1024, checkpoint=1024, seed=3, precision="fp32", device="cpu",
        channel_mult=(1, 2), num_blocks=2, attn_resolutions=(4,), ema_std=(0.01, 0.02, 0.03, 0.04), workers=1, xflip=True,
        cache=True, verify=False, metrics=("fd_pixels",), metrics_ref=str(ref), metrics_num=2, compile=False,
        checkpoint_activations=True, preview=1024, preview_images=7, preview_steps=3, on_divergence="warn", timeout=5,
        checkpoint_minutes=9.0, keep_checkpoints=3, milestones=2048, slice=4096, max_time=1.0, dropout_masks="round", on_nonfinite="skip",
    )  # fmt: skip
    assert {key: config.flat()[key] for key in expected} == expected
    assert len(list(tmp_path.glob("network-snapshot-*"))) == 4
    net = load_network(tmp_path / "network-snapshot-0000000-0.010.safetensors").net
    assert "unet.enc.4x4_block1.attn_qkv.weight" in net.state_dict()


def test_list_presets():
    lines = run_cli(train, "--list-presets").output.splitlines()
    rows = {line.split()[0]: line for line in lines[1:]}
    assert rows.keys() == TRAINING_PRESETS.keys()
    # 124.71 million numbers, each six times: weight, gradient, two moments, two averages.
    assert all(text in rows["edm2-img512-xs"] for text in ("124.71 M", " 2.8 GiB ", "64x64x4", "2147.5M"))
    assert "8x8x1" in rows["digits"] and " 3.9 MiB " in rows["digits"] and "2 CPU cores" in rows["digits"]


def test_without_a_preset_only_data_of_the_default_are_trained_on(tmp_path):
    def dry(data, *options):
        return run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--cond=0", "-n", *options)

    latents = make_dataset(tmp_path / "latents", {"a.npy": npy(np.random.default_rng(0).random([8, 64, 64], "f"))})
    result = dry(latents)
    assert result.exit_code == 0 and 'preset:           "edm2-img512-s"' in result.output, result.output
    fails_with(dry(DIGITS), "the default, edm2-img512-s, is for 64x64x4, not for images of 8x8x1", "does: digits")
    pixels = make_dataset(tmp_path / "pixels", random_images(1, size=64))
    published = "edm2-img64-xs, edm2-img64-s, edm2-img64-m, edm2-img64-l, edm2-img64-xl"
    fails_with(dry(pixels), f"give one that does: {published}, pixels64-cpu, pixels64-gpu, pixels64-8gpus;")
    gray = make_dataset(tmp_path / "gray", random_images(1, size=32, channels=None))
    fails_with(dry(gray), "give one that does: pixels32-cpu,", f"python dataset_tool.py check {gray} proposes")
    others = make_dataset(tmp_path / "others", random_images(1, size=16))
    fails_with(dry(others), "no preset does (they are for ", "64x64x3, 64x64x4, 8x8x1)", "--list-presets")


def test_units(tmp_path):
    result = run_cli(
        train, f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits", "--duration=1.5Gi", "--snapshot=2Mi", "-n"
    )
    assert "duration:         1610612736" in result.output
    assert "snapshot:         2097152" in result.output


def test_intervals_of_the_preset_become_multiples_of_the_batch(tmp_path):
    common = [f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits", "-n"]
    output = run_cli(train, *common, "--batch=100", "--snapshot=1000").output
    assert "Note: --status=4100, the next multiple of --batch=100" in output
    assert "Note: --checkpoint=49200, the next multiple of --batch=100" in output
    assert "snapshot:         1000" in output and "Note: --snapshot" not in output
    assert "Note: --" not in run_cli(train, *common).output


def test_says_how_the_data_were_understood(run, tmp_path):
    lines = [
        f"{DIGITS}: 1797 images (1797 .png), pixels of 8x8 with 1 channel",
        "labels: dataset.json, 10 classes: 0 (",
    ]
    log = (run / "log.txt").read_text().splitlines()
    assert log[0] == lines[0] and log[1].startswith(lines[1])
    dry = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--dry-run").output
    assert "\n".join(lines) in dry


def test_mirrored_images_are_not_counted_twice(tmp_path):
    output = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--xflip=1", "--dry-run").output
    assert "Dataset:          1797 images of 8x8x1, each also mirrored" in output and "3594" not in output
    assert "1797 images (1797 .png), pixels of 8x8 with 1 channel, each also mirrored" in output


def test_one_class_is_one_class(tmp_path):
    files = random_images(4)
    data = make_dataset(tmp_path / "data.zip", files, {name: 0 for name in files})
    output = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", *TINY, "--duration=256").output
    assert "Training on 4 images of 8x8x3, 1 class: " in output


def test_dry_run_looks_at_outdir(run, tmp_path):
    def dry(outdir, *options):
        return run_cli(train, f"--outdir={outdir}", f"--data={DIGITS}", *TINY, *options, "-n")

    before = sorted(path.name for path in run.iterdir())
    assert "Would start at 0 images" in dry(tmp_path / "new").output
    assert "Would resume at 3072 images" in dry(run, "--duration=4Ki").output
    assert "Would do nothing" in dry(run, "--duration=3Ki").output
    fails_with(dry(run, "--duration=3Ki", "--lr=1"), "was trained with --lr=0.04, not 1.0")
    fails_with(dry(run, "--duration=4Ki", "--no-resume"), "already holds a run")
    assert sorted(path.name for path in run.iterdir()) == before


def test_fp16_alias(tmp_path):
    common = [f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits", "-n"]
    assert 'precision:        "fp32"' in run_cli(train, *common, "--fp16=0").output
    fails_with(run_cli(train, *common, "--fp16=0", "--precision=bf16"), "--fp16=0 contradicts --precision=bf16")


def test_attention_that_is_nowhere_is_noted(tmp_path):
    result = run_cli(
        train, f"--outdir={tmp_path}", f"--data={DIGITS}", "--preset=digits", "--attn-resolutions=16", "-n"
    )
    assert "no level has a resolution of --attn-resolutions=16 (levels: 8, 4)" in result.output


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--preset=edm2-img512-xss"], ["unknown preset 'edm2-img512-xss'", "edm2-img512-xs", f"and {len(TRAINING_PRESETS) - 5} others (--list-presets shows all)"]),
        (["--batch=100", "--batch-gpu=33"], ["--batch=100 is not divisible by processes x --batch-gpu = 1 x 33"]),
        (["--status=100"], ["--status=100 must be multiples of --batch=128"]),
        (["--snapshot=1000"], ["--snapshot=1000 must be multiples of --batch=128"]),
        (["--checkpoint=129"], ["--checkpoint=129 must be multiples"]),
        (["--snapshot=512"], ["--snapshot must be at least 1000 images"]),
        (["--duration=12Xi"], ["--duration", "'12Xi' is not a number of images"]),
        (["--duration=0"], ["--duration must be at least 1"]),
        (["--batch=-1"], ["--batch", "'-1' is not a number of images"]),
        (["--duration=1e400"], ["--duration", "is not a number of images"]),
        (["--channel-mult=1,2,3,4,5"], ["resolution 8 is not divisible by 16", "--channel-mult"]),
        (["--channel-mult=1,x"], ["--channel-mult", "'x' is not a number"]),
        (["--channel-mult=none"], ["--channel-mult needs one positive number per level"]),
        (["--attn-resolutions=8;4"], ["--attn-resolutions"]),
        (["--ema-std=0.05,2"], ["--ema-std", "between 0.001 and 0.289"]),
        (["--dropout=1"], ["--dropout must be at least 0 and less than 1"]),
        (["--lr=0"], ["--lr must be positive"]),
        (["--P_std=0"], ["--P_std must be positive"]),
        (["--P_mean=nan"], ["--P_mean must be a finite number, not nan"]),
        (["--ls=inf"], ["--ls must be a finite number"]),
        (["--decay=inf"], ["--decay must be a finite number"]),
        (["--duration=1e99"], ["--duration", "is not a number of images"]),
        (["--ema-std=0.0501,0.0502"], ["--ema-std", "share a file name"]),
        (["--ema-std=0.1,0.1000000000001,...,0.2"], ["--ema-std", "even steps"]),
        (["--seed=4294967296"], ["--seed"]),
        (["--channels=0"], ["--channels must be at least 1"]),
        (["--seed=-1"], ["--seed"]),
        (["--precision=fp8"], ["--precision", "fp8"]),
        (["--device=tpu"], ["--device"]),
        (["--bogus"], ["--bogus"]),
        (["--data=nowhere.zip"], ["nowhere.zip: no such dataset"]),
    ],
)  # fmt: skip
def test_bad_training_options(tmp_path, options, fragments):
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", "--preset=digits", *options)
    fails_with(result, *fragments)
    assert not (tmp_path / "run").exists()


def test_missing_options_are_one_line():
    fails_with(run_cli(train), "--outdir", "--help")
    fails_with(run_cli(train, "--outdir=x"), "Missing option '--data'.", "--help")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_device_that_is_not_there(tmp_path):
    fails_with(
        run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", "--device=cuda"), "--device=cuda is not available"
    )


def test_bad_data(tmp_path):
    def try_data(files, labels=None):
        data = make_dataset(tmp_path / f"{len(list(tmp_path.iterdir()))}.zip", files, labels)
        return run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--preset=digits")

    fails_with(try_data(random_images(2)), "--cond=1 needs labels")
    odd = {**random_images(2), "odd.png": png(np.zeros([16, 16, 3], np.uint8))}
    fails_with(
        try_data(odd, {name: 0 for name in odd}), "odd.png is 16x16 with 3 channels, but 00000/img00000000.png is 8x8"
    )
    oblong = {"a.png": png(np.zeros([8, 9], np.uint8))}
    fails_with(try_data(oblong, {"a.png": 0}), "a.png is 9x8 with 1 channel, not square")
    (tmp_path / "text.zip").write_text("no zip")
    fails_with(
        run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={tmp_path / 'text.zip'}"),
        "text.zip: not a complete ZIP",
    )
    assert not (tmp_path / "run").exists()


def test_damaged_image_in_a_loader_process(tmp_path):
    files = random_images(150)
    # One that is not among the 100 of reals.png, so that the loader meets it first.
    name = f"00000/img{np.random.default_rng(0).permutation(150)[100]:08d}.png"
    files[name] = files[name][:100]
    data = make_dataset(tmp_path / "data.zip", files)
    for workers in (0, 1):
        result = run_cli(
            train, f"--outdir={tmp_path / 'run'}", f"--data={data}", "--cond=0", *TINY, f"--workers={workers}"
        )
        fails_with(result, f"{data}: cannot read {name}")


def test_outdir_of_another_run(run):
    def again(*options):
        return run_cli(train, f"--outdir={run}", f"--data={DIGITS}", *TINY, "--duration=3Ki", *options)

    for options, fragment in [
        (["--lr=0.1"], "was trained with --lr=0.04, not 0.1"),
        (["--batch=128"], "--batch=256, not 128"),
        (["--channel-mult=1,1"], "--channel-mult=1, not 1,1"),
        (["--seed=1"], "--seed=0, not 1"),
        (["--P_mean=0"], "--P_mean=-0.4, not 0.0"),
        (["--ema-std=0.05"], "--ema-std=0.05,0.1, not 0.05"),
        (["--cond=0"], "--cond=1, not 0"),
        (["--no-resume"], "already holds a run"),
    ]:
        fails_with(again(*options), str(run), fragment)
    changeable = again(
        "--status=256",
        "--snapshot=0",
        "--checkpoint=0",
        "--batch-gpu=128",
        "--device=cpu",
        "--precision=bf16",
        "--workers=1",
    )
    assert changeable.exit_code == 0, changeable.output


def test_other_data_under_the_same_name(run, tmp_path):
    files = random_images(10, channels=None)
    data = make_dataset(tmp_path / "other.zip", files, {name: i for i, name in enumerate(files)})
    result = run_cli(train, f"--outdir={run}", f"--data={data}", *TINY, "--duration=3Ki")
    fails_with(result, "was trained on other data", "count was 1797, is 10")
    with zipfile.ZipFile(DIGITS) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name.endswith(".png")}
    for label_dim, change in [(7, "label_dim was 10, is 7"), (10, "their content differs")]:
        relabeled = make_dataset(
            tmp_path / f"{label_dim}.zip", files, {name: i % label_dim for i, name in enumerate(files)}
        )
        fails_with(run_cli(train, f"--outdir={run}", f"--data={relabeled}", *TINY, "--duration=3Ki"), change)
    moved = shutil.copy(DIGITS, tmp_path / "moved.zip")
    assert run_cli(train, f"--outdir={run}", f"--data={moved}", *TINY, "--duration=3Ki").exit_code == 0


def test_damaged_options_file(tmp_path):
    (tmp_path / "training_options.json").write_text("{")
    (tmp_path / "training-state-0000001.pt").write_bytes(b"")
    fails_with(
        run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY), "training_options.json: not the options"
    )


def test_outdir_among_the_images(tmp_path):
    """Its pictures would be images of the next run."""
    data = make_dataset(tmp_path / "data", random_images(4))
    for outdir in (data, data / "runs" / "1"):
        result = run_cli(train, f"--outdir={outdir}", f"--data={data}", "--cond=0", *TINY, "--dry-run")
        fails_with(result, f"--outdir={outdir}: is inside --data={data}: choose another place")


def test_outdir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    fails_with(run_cli(train, f"--outdir={tmp_path / 'file'}", f"--data={DIGITS}", *TINY), "--outdir", "is a file")
