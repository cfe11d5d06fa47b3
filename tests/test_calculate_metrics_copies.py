"""The command calculate_metrics.py: memorisation, diversity and classes."""

import numpy as np
from conftest import DIGITS, fails_with, make_dataset, png, random_images
from measuring import records_of, tool, values_of

from training.dataset.images import ImageFolderDataset
from training.metrics import load_stats


def test_copies_and_classes(tmp_path):
    """Against a training set and held-out images, as files of statistics and as images; and what needs no reference."""
    digits = ImageFolderDataset(DIGITS)
    arrays = np.concatenate([digits[i][0] for i in range(1797)])
    labels = [digits.get_stored_label(i) for i in range(1797)]
    parts = {"train": range(0, 900), "held_out": range(900, 1300), "fresh": range(1300, 1797)}
    for name, chosen in parts.items():
        files = {f"{i:06d}.png": png(arrays[i]) for i in chosen}
        make_dataset(tmp_path / f"{name}.zip", files, {f"{i:06d}.png": labels[i] for i in chosen})
    metrics = "vendi_pixels,memorisation_pixels,ct_pixels,balance_pixels"
    tool(
        "ref",
        f"--data={tmp_path / 'train.zip'}",
        f"--dest={tmp_path / 'train.npz'}",
        f"--metrics={metrics}",
        "--workers=0",
    )
    assert np.bincount(load_stats(tmp_path / "train.npz").classes).tolist() == np.bincount(labels[:900]).tolist()
    common = [f"--metrics={metrics}", "--num=400", "--workers=0", f"--held-out={tmp_path / 'held_out.zip'}"]
    fresh, copies = (
        tool("calc", f"--images={tmp_path / name}", f"--ref={tmp_path / ref}", *common)
        for name, ref in [("fresh.zip", "train.npz"), ("train.zip", "train.zip")]
    )
    ours, theirs = values_of(fresh.output), values_of(copies.output)
    assert ours["memorised_pixels"] < 0.1 and theirs["memorised_pixels"] == 1 and theirs["calibrated_pixels"] < 1e-3
    assert abs(ours["ct_pixels"]) < 3 and theirs["ct_pixels"] < -5
    assert ours["imbalance_pixels"] < 0.15 and ours["rarest_pixels"] > 0.5
    assert 1 < ours["vendi_pixels"] < 64
    record = next(record for record in records_of(fresh.output) if record["metric"] == "ct_pixels")
    assert (
        record["held_out"] == str(tmp_path / "held_out.zip")
        and record["held_out_statistics"] == "computed from its images"
    )
    assert record["ref_statistics"] == "stored" and "held_out_hash" in record
    assert "ref" not in next(record for record in records_of(fresh.output) if record["metric"] == "vendi_pixels")
    # What cannot be.
    unlabelled = make_dataset(tmp_path / "unlabelled", random_images(60))
    fails_with(
        tool("calc", f"--images={unlabelled}", f"--ref={unlabelled}", "--metrics=balance_pixels", "--num=60", ok=False),
        "says no classes of its images, which balance needs",
    )
    small = make_dataset(tmp_path / "small.zip", random_images(30, size=16))
    other = [f"--ref={tmp_path / 'train.npz'}", f"--held-out={small}", "--metrics=ct_pixels", "--num=400"]
    result = tool("calc", f"--images={tmp_path / 'fresh.zip'}", *other, "--workers=0", ok=False)
    fails_with(result, "the images are 8x8, those of the set of held-out images 16x16")
