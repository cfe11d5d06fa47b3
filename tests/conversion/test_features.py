"""Features of the published U-ViT code, written here as it writes them, and files that are none."""

import os
import pickle

import numpy as np
import pytest
from conftest import fails_with, npy, run_cli

from dataset_tool import main as dataset_tool
from torch_utils.object_arrays import load_values
from training.dataset.images import ImageFolderDataset

RNG = np.random.default_rng(0)
MOMENTS = RNG.standard_normal([3, 8, 4, 4]).astype(np.float32)
CONTEXTS = RNG.standard_normal([5, 6, 7]).astype(np.float32)


def objects(*values) -> bytes:
    """A file of an array of objects."""
    array = np.empty([len(values)], object)
    array[:] = values
    return npy(array)


def folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def imported(source, dest, *options):
    return run_cli(dataset_tool, "features", f"--source={source}", f"--dest={dest}", *options)


def test_values():
    array, number, text = load_values(objects(MOMENTS[0], np.int64(7), "a cat"))
    assert np.array_equal(array, MOMENTS[0]) and (number, text) == (7, "a cat")
    fortran, big = load_values(objects(np.asfortranarray(MOMENTS[0]), np.arange(3, dtype=">i4")))
    assert np.array_equal(fortran, MOMENTS[0]) and big.tolist() == [0, 1, 2]
    assert np.array_equal(load_values(npy(MOMENTS))[0], MOMENTS)


def test_latents_with_labels(tmp_path):
    source = folder(tmp_path / "f", {f"{i}.npy": objects(MOMENTS[i], np.int64(4 - i)) for i in range(3)})
    result = imported(source, tmp_path / "out.zip", "--scale=0.5", "--resume")
    assert result.exit_code == 0 and "3 latents" in result.output, result.output
    dataset = ImageFolderDataset(tmp_path / "out.zip")
    assert [dataset.get_stored_label(i) for i in range(3)] == [4, 3, 2]
    mean, std = np.split(dataset[1][0], 2)
    np.testing.assert_allclose(mean, MOMENTS[1][:4])
    np.testing.assert_allclose(std, np.exp(MOMENTS[1][4:] / 2), rtol=1e-6)
    assert dataset.encoder_record["kwargs"]["scale"] == 0.5


def captioned(path):
    contexts = {f"train/{name}.npy": npy(CONTEXTS[i]) for i, name in enumerate(["0_0", "0_1", "1_0"])}
    latents = {f"train/{i}.npy": npy(MOMENTS[i]) for i in range(2)}
    return folder(path, contexts | latents | {"empty_context.npy": npy(CONTEXTS[4])}) / "train"


def test_latents_with_captions(tmp_path):
    result = imported(captioned(tmp_path / "f"), tmp_path / "out.zip")
    assert result.exit_code == 0 and "2 latents, 3 contexts" in result.output, result.output
    dataset = ImageFolderDataset(tmp_path / "out.zip", use_captions=True)
    assert dataset.captions.shape == (6, 7) and np.array_equal(dataset.captions.empty, CONTEXTS[4])
    assert [np.array_equal(dataset.get_label(0, k), CONTEXTS[k]) for k in range(2)] == [True, True]
    assert dataset.encoder_record["kwargs"]["scale"] == 0.2301


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


HEADER = npy(np.zeros([0], object)).partition(b"\n")[0] + b"\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no features 0.npy, 1.npy"),
        ({"0.npy": objects(MOMENTS[0], Hostile())}, "system; nothing in the file was run"),
        ({"0.npy": HEADER + pickle.dumps(Hostile())}, "nothing in the file was run"),
        ({"0.npy": HEADER + pickle.dumps([1])}, "not an array of objects"),
        ({"0.npy": HEADER + b"junk"}, "cannot be read"),
        ({"0.npy": objects(MOMENTS[0], np.int64(1))[:-40]}, "cannot be read"),
        ({"0.npy": b""}, "cannot be read"),
        ({"0.npy": npy(MOMENTS[0]).replace(b"}", b" ")}, "cannot be read"),
        ({"0.npy": objects()}, "not moments of latents"),
        ({"0.npy": npy(MOMENTS)}, "not moments of latents"),
        ({"0.npy": npy(MOMENTS[0].astype(np.float64))}, "not moments of latents"),
        ({"0.npy": objects(MOMENTS[0], "x")}, "not moments and a label"),
        ({"0.npy": objects(MOMENTS[0], -1)}, "not moments and a label from 0 to"),
        ({"0.npy": objects(MOMENTS[0], np.int64(1)), "1.npy": npy(MOMENTS[1])}, "only 1 of 2 features have labels"),
        ({"0.npy": npy(MOMENTS[0]), "0_0.npy": npy(CONTEXTS[0])}, "captions need empty_context.npy"),
    ],
)
def test_files_that_are_no_features(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    fails_with(imported(folder(tmp_path / "f", files), tmp_path / "out.zip"), message)
    assert not (tmp_path / "out.zip").exists() and not (tmp_path / "hostile-code-ran").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("0_0.npy", npy(CONTEXTS[0][:2]), "not a context, float32"),
        ("0_0.npy", objects(CONTEXTS[0], CONTEXTS[1]), "not a context, float32"),
        ("2.npy", npy(MOMENTS[2]), "no caption 2_0.npy of 2.npy"),
        ("../empty_context.npy", npy(CONTEXTS), "not a context"),
    ],
)
def test_captions_that_do_not_fit(tmp_path, name, data, message):
    source = captioned(tmp_path / "f")
    (source / name).write_bytes(data)
    fails_with(imported(source, tmp_path / "out.zip"), message)
