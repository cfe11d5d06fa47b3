"""Labels of tables and of sources, and what is said about those that do not fit."""

import pytest
from conftest import fails_with, make_dataset, png
from sources import check, convert, image, labels_of, make_tar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("filename,label\n0.png,3\n1.png,1\n", [3, 1]),
        ("0.png,3\n1.png,1\n", [3, 1]),
        ("a/0.png,zebra\na/1.png,ant\n", [1, 0]),
        ("./0.png, 3\n0//../1.png,1\n", [3, 1]),
    ],
)
def test_label_files(text, expected, tmp_path):
    source = make_dataset(tmp_path / "src", {f"{i}.png": png(image(8, 8)) for i in range(2)})
    (tmp_path / "labels.csv").write_text(text)
    dataset = convert(tmp_path, source, options=[f"--labels={tmp_path / 'labels.csv'}", "--workers=1"])
    assert labels_of(dataset) == expected


def test_labels_that_do_not_fit(tmp_path):
    source = make_dataset(tmp_path / "src", {f"{i}.png": png(image(8, 8)) for i in range(5)})
    (tmp_path / "l.csv").write_text("0.png,1\n")
    options = [f"--labels={tmp_path / 'l.csv'}"]
    fails_with(
        convert(tmp_path, source, ok=False, options=options),
        "l.csv: none for 4 images, such as 1.png, 2.png, 3.png: complete them",
    )
    (tmp_path / "l.csv").write_text("0.png,1\n0.png,2\n")
    fails_with(convert(tmp_path, source, dest="b.zip", ok=False, options=options), "0.png is listed twice, as 1 and 2")
    (tmp_path / "l.csv").write_text("0.png,1,2\n")
    fails_with(convert(tmp_path, source, dest="b.zip", ok=False, options=options), "'0.png,1,2' is not of the form")
    for text, fragment in {
        "0.png,\n": "'0.png,' is not of the form filename,label",
        "filename,label\n": "holds no labels",
        "0.png,1\n1.png,-1\n": "'-1' is no class",
        "0.png,1.5\n": "'1.5' is no class",
        "0.png," + "1" * 5000 + "\n": "1' is no class",
        "a/0.png,1\nb/0.png,2\n": "none for 5 images, such as 0.png",
    }.items():
        (tmp_path / "l.csv").write_text(text)
        fails_with(convert(tmp_path, source, dest="b.zip", ok=False, options=options), fragment)
        for left in tmp_path.glob("b.zip.partial*"):
            left.unlink()


@pytest.mark.parametrize(
    ("labels", "fragment"),
    [
        ([1, "a"], "different kinds"),
        ([-1, 2], "'-1' is no label"),
        ([True, False], "'True' is no label"),
        ([10**30, 1], "is no label"),
        ([[1.0], [1.0, 2.0]], "'[1.0, 2.0]' is no label"),
        ([1, None], "none for 1 images, such as 1.png"),
    ],
)
def test_labels_of_sources(labels, fragment, tmp_path):
    files = {f"{i}.png": png(image(8, 8)) for i in range(2)}
    source = make_dataset(tmp_path / "src.zip", files, {f"{i}.png": label for i, label in enumerate(labels)})
    fails_with(convert(tmp_path, source, ok=False), fragment)


def test_labels_that_would_be_lost(tmp_path):
    """Where labels are evidently there, they are used, or it is said why not."""
    pictures = {"a/1.png": png(image(8, 8)), "a/2.png": png(image(8, 8))}
    source = make_dataset(tmp_path / "names", pictures, {"a/1.PNG": 0, "a/2.PNG": 1})
    fails_with(
        convert(tmp_path, source, ok=False), "of none of its images (it says a/1.PNG, the images are such as a/1.png)"
    )
    twice = b'{"labels": [["a/1.png", 0], ["a/1.png", 1], ["a/2.png", 1]]}'
    source = make_dataset(tmp_path / "twice", {**pictures, "dataset.json": twice})
    fails_with(convert(tmp_path, source, ok=False), "a/1.png is listed twice, as 0 and 1")
    assert "a/1.png is listed twice" in check(source, exit_code=1)["problems"][0]
    by_type = {"a.png": png(image(8, 8)), "b.png": png(image(8, 8)), "a.cls": b"1", "b.CLS": b"2"}
    source = make_tar(tmp_path / "sorted by type.tar", by_type)
    fails_with(
        convert(tmp_path, source, ok=False), "a.cls has no image beside it: the files of a sample must lie together"
    )
    named = {"ds\\cat\\1.png": png(image(8, 8)), "ds\\dog\\1.png": png(image(8, 8))}
    source = make_dataset(tmp_path / "windows.zip", {name.removeprefix("ds\\"): data for name, data in named.items()})
    result = convert(tmp_path, source, ok=False)
    assert result.exit_code == 0 and "2 images, 2 classes" in result.output
