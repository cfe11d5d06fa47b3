"""Tables of labels, as Kaggle and spreadsheets have them."""

from pathlib import Path

import pytest
from conftest import fails_with, make_dataset, png
from sources import convert, image, labels_of

from training.dataset.images import ImageFolderDataset


def photos(path: Path, *names: str) -> Path:
    return make_dataset(path, {name: png(image(8, 8, seed=i)) for i, name in enumerate(names)})


def labelled(tmp_path: Path, text: str | bytes, *sources: Path, ok: bool = True, options: tuple[str, ...] = ()):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return convert(tmp_path, *sources, ok=ok, options=[f"--labels={tmp_path / 't.csv'}", "--workers=1", *options])


IDS = [f"{k:03d}abc" for k in range(4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id,breed\n" + "".join(f"{name},{'ba'[k % 2]}\n" for k, name in enumerate(IDS)), [1, 0, 1, 0]),
        ("image_id,label\n" + "".join(f"{name}.jpg,{k % 2}.0\n" for k, name in enumerate(IDS)), [0, 1, 0, 1]),
        (",image,label\n" + "".join(f"{k},{name}.jpg,{k % 2}\n" for k, name in enumerate(IDS)), [0, 1, 0, 1]),
        ("Unnamed: 0,Image,Class\n" + "".join(f"{k},{n}.jpg,{k % 2}\n" for k, n in enumerate(IDS)), [0, 1, 0, 1]),
        ("".join(f"{k},{name}.jpg,{k % 2}\n" for k, name in enumerate(IDS, 1)), [1, 0, 1, 0]),
        ("Label;Filename\n" + "".join(f"{k};{name}.JPG\n" for k, name in enumerate(IDS)), [0, 1, 2, 3]),
        ("".join(f"{name}.jpg\t{k}\n" for k, name in enumerate(IDS)), [0, 1, 2, 3]),
        ("".join(f"{name}.jpg {k}\r\n" for k, name in enumerate(IDS)), [0, 1, 2, 3]),
        ("".join(f"{name.upper()}.PNG,{k}\n" for k, name in enumerate(IDS)), [0, 1, 2, 3]),
        ("".join(f"train\\{name}.jpg,{k}\n" for k, name in enumerate(IDS)), [0, 1, 2, 3]),
        ("".join(f'"{name}.jpg","{k}"\n' for k, name in enumerate(IDS)).encode("utf-16"), [0, 1, 2, 3]),
        ("".join(f"{name}.jpg,y\n" for name in IDS), [0, 0, 0, 0]),  # a class, not a heading
    ],
)
def test_forms(text, expected, tmp_path):
    source = photos(tmp_path / "kg", *(f"{name}.jpg" for name in IDS))
    assert labels_of(labelled(tmp_path, text, source)) == expected


def test_columns(tmp_path):
    source = photos(tmp_path / "kg", "0.png", "1.png")
    text = "name,age,sex\n0.png,30,f\n1.png,40,m\n"
    result = labelled(tmp_path, text, source, ok=False)
    fails_with(result, "t.csv: which column? choose --label-key from age, sex")
    result = labelled(tmp_path, text, source, ok=False, options=("--label-key=height",))
    fails_with(result, "t.csv: --label-key=height: no such column (there are age, sex)")
    dataset = labelled(tmp_path, text, source, options=("--label-key=Sex",))
    assert (labels_of(dataset), dataset.class_names) == ([0, 1], ["f", "m"])
    (tmp_path / "out.zip").unlink()
    text = "file,copy,label\n0.png,1.png,5\n1.png,0.png,6\n"
    assert labels_of(labelled(tmp_path, text, source, options=("--image-key=copy",))) == [6, 5]
    fails_with(convert(tmp_path, source, dest="x.zip", ok=False, options=["--label-key=a"]), "leave the option out")


def test_equal_names_in_two_sources(tmp_path):
    """A row that might belong to images of both is ambiguous; the source before the name tells them apart."""
    sources = [photos(tmp_path / name, "0.png", "1.png") for name in ("a", "b.zip")]
    result = labelled(tmp_path, "0.png,0\n1.png,1\n", *sources, ok=False)
    fails_with(
        result, f"its row 0.png fits {sources[0]}/0.png as well as {sources[1]}/0.png: write the source or folder"
    )
    for left in tmp_path.glob("out.zip.*"):
        left.unlink()
    text = "a/0.png,0\na/1.png,1\nb/0.png,2\nb/1.png,3\n"
    assert labels_of(labelled(tmp_path, text, *sources)) == [0, 1, 2, 3]


def test_equal_names_in_two_folders(tmp_path):
    source = photos(tmp_path / "src", "cat/0.png", "dog/0.png")
    result = labelled(tmp_path, "0.png,0\n", source, ok=False)
    fails_with(result, f"its row 0.png fits {source}/cat/0.png as well as {source}/dog/0.png")
    for left in tmp_path.glob("out.zip.*"):
        left.unlink()
    assert labels_of(labelled(tmp_path, "x/Cat/0.png,7\nx/dog/0.png,8\n", source)) == [7, 8]


def test_equal_names_in_one_table(tmp_path):
    """They count where they say the same."""
    source = photos(tmp_path / "src", "0.png")
    assert labels_of(labelled(tmp_path, "a/0.png,3\nb/0.png,3\n", source)) == [3]


def test_what_does_not_fit_is_told(tmp_path):
    source = photos(tmp_path / "src", "0.png", "1.png")
    result = labelled(tmp_path, "0.png,0\nimg1.png,1\nimg2.png,1\n", source, ok=False)
    fails_with(result, "none for 1 images, such as 1.png (there are rows for img1.png, img2.png, which are no images)")
    for left in tmp_path.glob("out.zip.*"):
        left.unlink()
    result = labelled(tmp_path, "0.png,0\n1.png,1\n2.png,1\n", source, ok=False)
    assert result.exit_code == 0 and f"1 row of {tmp_path / 't.csv'} without an image, such as 2.png\n" in result.output


HF = {"csv": "file_name,label\n0.png,dog\n1.png,cat\n", "jsonl": ""}
HF["jsonl"] = "".join(f'{{"file_name": "{i}.png", "label": "{c}", "box": [1]}}\n' for i, c in enumerate(["dog", "cat"]))


@pytest.mark.parametrize("kind", HF)
def test_tables_beside_the_images(kind, tmp_path):
    """As the Hugging Face hub keeps folders of images: what is not taken is said, with the remedy."""
    files = {f"{i}.png": png(image(8, 8, seed=i)) for i in range(2)}
    source = make_dataset(tmp_path / "src", {**files, f"metadata.{kind}": HF[kind].encode()})
    note = f"metadata.{kind} may hold labels: they are taken by dataset_tool.py convert --labels"
    assert note in ImageFolderDataset(source).notes
    assert ImageFolderDataset(make_dataset(tmp_path / "l", {**files}, {name: 0 for name in files})).notes == []
    result = convert(tmp_path, source, dest="none.zip", ok=False)
    assert note in result.output and "no classes" in result.output
    dataset = convert(tmp_path, source, options=[f"--labels={source / f'metadata.{kind}'}"])
    assert labels_of(dataset) == [1, 0] and dataset.class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]\n", "'[1]' is no JSON object"),
        ('{"file_name": "0.png", "label": 1', "is no JSON object"),
        ('{"file_name": "0.png"}\n', "holds no labels"),
        ("", "holds no labels"),
        ('{"file_name": "0.png", "label": 1}\n{"label": 1}\n', "line 2 has other entries than file_name, label"),
    ],
)
def test_json_lines_of_another_form(text, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(text)
    source = photos(tmp_path / "src", "0.png")
    result = convert(tmp_path, source, ok=False, options=[f"--labels={tmp_path / 't.jsonl'}"])
    fails_with(result, f"t.jsonl: {message}" if message[0] != "i" else message)


def test_accents_as_macos_codes_them(tmp_path):
    """Two characters in names of files, one in tables that people type."""
    source = photos(tmp_path / "src", "cafe\u0301 0.png", "cafe\u0301 1.png")
    assert labels_of(labelled(tmp_path, "name,label\ncaf\u00e9 0.png,1\ncaf\u00e9 1,0\n", source)) == [1, 0]
