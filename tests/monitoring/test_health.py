"""Runs that go wrong say so, stop, and leave nothing unreadable."""

import json
import math
import zipfile

import pytest
import torch
from conftest import DIGITS, TINY, fails_with, run_cli, tiny_network

from train_edm2 import main as train
from training.monitoring.health import Divergence, weight_beyond_float16
from training.snapshot import load_network

HALVES = ["--preset=digits", "--channels=8", "--batch=64", "--status=512", "--snapshot=1024", "--checkpoint=1024",
          "--preview=0"]  # fmt: skip


def run(outdir, *options):
    return run_cli(train, f"--outdir={outdir}", f"--data={DIGITS}", *HALVES, *options)


@pytest.mark.parametrize(
    ("start", "loss", "diverged"),
    [(1.2, 0.1, False), (1.2, 100, False), (1.2, 130, True), (-3.0, 250, False), (-3.0, 298, True), (0.01, 101, True)],
)
def test_limit(tmp_path, start, loss, diverged):
    (tmp_path / "stats.jsonl").write_text(json.dumps({"nimg": 512, "loss": start}) + "\n")
    assert (Divergence(tmp_path)(loss) is not None) == diverged


def test_the_first_report_is_where_the_loss_starts(tmp_path):
    check = Divergence(tmp_path)
    assert check(5.0) is None and check(400.0) is None
    assert check(506.0) == "the loss is 506, after 5 at the start"


def test_divergence_stops_and_keeps_the_good_state(tmp_path):
    assert run(tmp_path, "--duration=1Ki", "--lr=0.02").exit_code == 0
    good = {path.name for path in tmp_path.iterdir()}
    options = tmp_path / "training_options.json"
    options.write_text(options.read_text().replace('"lr": 0.02', '"lr": 1000.0'))
    result = run(tmp_path, "--duration=8Ki", "--lr=1000")
    fails_with(result, "training has diverged at", "the loss is", "a lower --lr", "--on-divergence=warn", exit_code=1)
    states = {path.name for path in tmp_path.glob("training-state-*")} | {p.name for p in tmp_path.glob("network-*")}
    assert states <= good, "nothing was saved after it"


def test_divergence_that_is_only_warned_about_leaves_readable_snapshots(tmp_path):
    result = run(tmp_path, "--duration=4Ki", "--lr=1e6", "--on-divergence=warn")
    assert result.exit_code == 0
    assert "Warning: training has diverged at" in result.output
    for path in tmp_path.glob("network-snapshot-*"):
        assert all(torch.isfinite(p).all() for p in load_network(path).net.parameters())


def test_weights_beyond_float16_are_named():
    net = tiny_network()
    assert weight_beyond_float16(net) is None
    net.unet.out_gain.fill_(7e4)
    assert weight_beyond_float16(net) == "unet.out_gain"
    net.unet.out_gain.fill_(math.nan)
    assert weight_beyond_float16(net) == "unet.out_gain"


def test_a_flipped_bit_in_a_state_is_noticed(tmp_path):
    """Case robust/15: torch reads it without a word."""
    assert run(tmp_path, "--duration=2Ki").exit_code == 0
    path = tmp_path / "training-state-0000002.pt"
    with zipfile.ZipFile(path) as archive:
        entry = max((info for info in archive.infolist() if "/data/" in info.filename), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 200] ^= 0x40
    path.write_bytes(data)
    result = run(tmp_path, "--duration=3Ki")
    assert "training-state-0000002.pt is damaged and skipped (checksum mismatch in" in result.output
    assert "Resuming at 1024 images" in result.output


def test_previews(tmp_path):
    result = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--duration=2Ki", "--preview=2048",
                     "--preview-images=6", "--preview-steps=2")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.glob("fakes-*")] == ["fakes-0000002.png"]
    import PIL.Image

    with PIL.Image.open(tmp_path / "fakes-0000002.png") as picture:
        assert picture.height < 100 < 400 < picture.width
    assert len(list(tmp_path.glob("network-snapshot-*"))) == 4


def test_no_previews(tmp_path):
    assert run(tmp_path, "--duration=1Ki").exit_code == 0
    assert not list(tmp_path.glob("*.png"))
