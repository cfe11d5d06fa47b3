"""Labels of dataset.json and of class folders."""

import json

import pytest
from conftest import DIGITS, make_dataset, random_images

from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset


def test_labels_from_directories(tmp_path):
    files = {f"{c}/{i}.png": data for c in ("cat", "ant") for i, data in enumerate(random_images(2).values())}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files))
    assert dataset.label_dim == 2
    assert [dataset[i][1].argmax() for i in range(4)] == [0, 0, 1, 1]  # ant, cat
    flat = make_dataset(tmp_path / "flat", {f"{i}.png": data for i, data in enumerate(random_images(2).values())})
    assert not ImageFolderDataset(flat).has_labels


def test_vector_labels(tmp_path):
    files = random_images(2)
    labels = {name: [0.5, float(i)] for i, name in enumerate(files)}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files, labels))
    assert dataset.label_dim == 2
    assert dataset[1][1].tolist() == [0.5, 1.0]


def test_labels_ignored_or_null(tmp_path):
    files = random_images(2)
    path = make_dataset(tmp_path / "data", {**files, "dataset.json": b'{"labels": null}'})
    assert ImageFolderDataset(path).label_dim == 0
    assert ImageFolderDataset(DIGITS, use_labels=False)[0][1].shape == (0,)


@pytest.mark.parametrize(
    ("json", "message"),
    [
        (b"{", "is not of the form"),
        (b"[]", "is not of the form"),
        (b'{"labels": [["00000/img00000000.png", 1]]}', "has no label for 1 images, such as 00000/img00000001.png"),
        (b'{"labels": [["00000/img00000000.png", -1], ["00000/img00000001.png", 0]]}', "integers from 0"),
        (b'{"labels": [["00000/img00000000.png", 1000000000], ["00000/img00000001.png", 0]]}', "integers from 0"),
        (b'{"labels": [["00000/img00000000.png", [NaN]], ["00000/img00000001.png", [0]]]}', "finite numbers"),
        (b'{"labels": [["00000/img00000000.png", []], ["00000/img00000001.png", []]]}', "finite numbers"),
        (b"[" * 100000, "is not of the form"),
        (b'{"labels": [["00000/img00000000.png", "a"], ["00000/img00000001.png", "b"]]}', "integers from 0"),
        (b'{"labels": [["00000/img00000000.png", [1, 2]], ["00000/img00000001.png", [1]]]}', "differ in length"),
    ],
)
def test_bad_labels(tmp_path, json, message):
    path = make_dataset(tmp_path / "data", {**random_images(2), "dataset.json": json})
    with pytest.raises(UserError, match=f"dataset.json.*{message}"):
        ImageFolderDataset(path)


def test_class_names(tmp_path):
    files = random_images(3)
    labels = {"labels": [[name, i] for i, name in enumerate(files)]}
    for classes, expected in (
        (["a", "b", "c"], ["a", "b", "c"]),
        (["a", "b", "c", "rare"], ["a", "b", "c", "rare"]),
        (None, None),
    ):
        text = json.dumps({**labels, "classes": classes}).encode()
        path = make_dataset(tmp_path / str(expected), {**files, "dataset.json": text})
        dataset = ImageFolderDataset(path)
        assert (dataset.class_names, dataset.label_dim) == (expected, 3)
    for classes, message in ((["a", "b"], "names of 2 classes, but labels of 3"), ([1, 2, 3], "is not of the form")):
        text = json.dumps({**labels, "classes": classes}).encode()
        with pytest.raises(UserError, match=f"dataset.json.*{message}"):
            ImageFolderDataset(make_dataset(tmp_path / message[:5], {**files, "dataset.json": text}))


def test_classes_and_label_vectors_in_the_summary(tmp_path):
    files = random_images(2)
    labels = {name: [0.5, float(i), 2.0] for i, name in enumerate(files)}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "v", files, labels))
    assert dataset.summary()[1] == "labels: dataset.json, vectors of length 3"
    assert ImageFolderDataset(DIGITS).summary()[1].startswith("labels: dataset.json, 10 classes: 0 (178), 1 (182), ")
    assert ImageFolderDataset(DIGITS, use_labels=False).summary()[1] == "labels: not used"


@pytest.mark.parametrize("bad", ["a\nb", "\x1b[31m", "\x7f"])
def test_messages_are_one_line_whatever_names_hold(bad, tmp_path):
    """Found with damaged archives: names that control the terminal."""
    files = {f"{bad}.png": next(iter(random_images(1).values())), f"c.{bad}": b""}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "plain.zip", files))
    named = json.dumps({"labels": [[f"{bad}.png", 0], [bad, 1]], "classes": [bad, "b"]}).encode()
    other = ImageFolderDataset(make_dataset(tmp_path / "named.zip", {**files, "dataset.json": named}))
    assert all(line.isprintable() for line in [*dataset.summary(), *other.summary(), dataset.name(0)])
    for i, labels in enumerate(([], [[bad, 0], [bad, 1], [f"{bad}.png", 1]])):
        text = json.dumps({"labels": labels}).encode()
        with pytest.raises(UserError) as err:
            ImageFolderDataset(make_dataset(tmp_path / f"{i}.zip", {**files, "dataset.json": text}))
        assert str(err.value).isprintable()
