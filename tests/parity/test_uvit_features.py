"""Features of the published code against the golden values."""

import numpy as np
import pytest
from conftest import ROOT
from uvit_golden import ROOM

from training.conversion.features import import_features, read_prompt
from training.dataset.images import ImageFolderDataset

FOLDER = ROOM / "features"
if ROOM != ROOT / "tests" / "golden" / "uvit":  # where they are left out for their size
    assert FOLDER.is_dir(), f"{ROOM}: no features"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="golden files that are kept elsewhere")


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as f:
        return dict(f)


@pytest.mark.parametrize("size", [256, 512])
def test_imagenet(size, expected, tmp_path):
    count, contexts = import_features(FOLDER / f"imagenet{size}_features", tmp_path / "out.zip")
    dataset = ImageFolderDataset(tmp_path / "out.zip")
    prefix = "imagenet" if size == 256 else "imagenet512"
    assert contexts == 0 and count == len(dataset)
    for i in range(count):
        mean, std = np.split(dataset[i][0].astype(np.float64), 2)
        assert (mean.sum() + 2 * np.log(std).sum()) == pytest.approx(
            expected[f"{prefix}/{i}/moments_sum"], rel=1e-4, abs=0.02
        )
        assert dataset.get_stored_label(i) == expected[f"{prefix}/{i}/label"]
    assert dataset.encoder_record["kwargs"]["scale"] == 0.18215


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco(split, expected, tmp_path):
    count, contexts = import_features(FOLDER / "coco256_features" / split, tmp_path / "out.zip")
    dataset = ImageFolderDataset(tmp_path / "out.zip", use_captions=True)
    sums = {key: value for key, value in expected.items() if key.startswith(f"coco/{split}/") and "context" in key}
    assert contexts == len(sums) and count == len(dataset)
    for i in range(count):
        for visit in range(len(dataset.captions.texts[i])):
            context = dataset.get_label(i, visit)
            k = (i + visit) % len(dataset.captions.texts[i])
            assert context.sum(dtype=np.float64) == pytest.approx(
                sums[f"coco/{split}/{i}_{k}/context_sum"], rel=1e-4, abs=0.01
            )
    assert dataset.captions.empty.sum(dtype=np.float64) == pytest.approx(expected["coco/empty_context_sum"], rel=1e-4)
    assert dataset.encoder_record["kwargs"]["scale"] == 0.2301


def test_prompts(expected):
    for path in sorted((FOLDER / "coco256_features" / "run_vis").glob("*.npy")):
        text, context = read_prompt(path)
        wanted = expected[f"coco/run_vis/{path.stem}/context_sum"]
        assert text and context.sum(dtype=np.float64) == pytest.approx(wanted, rel=1e-4)
