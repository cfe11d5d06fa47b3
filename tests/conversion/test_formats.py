"""Every kind of source, whole and damaged."""

import gzip
import json
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import fails_with, make_dataset, npy, png
from sources import convert, damaged, encoded, folder_of_classes, idx_file, image, labels_of, make_tar, python2_batch

from training.conversion.opening import open_source
from training.conversion.sources import Choice
from training.dataset.images import ImageFolderDataset

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("folder", "key"), [("cifar-10-batches-py", "labels"), ("cifar-100-python", "fine_labels")])
def test_cifar(folder, key, tmp_path):
    pixels = RNG.integers(0, 256, [5, 3 * 32 * 32], dtype=np.uint8)
    train, test = ("data_batch_1", "test_batch") if key == "labels" else ("train", "test")
    files = {
        f"{folder}/{test}": python2_batch(pixels[3:], [7, 8], key),
        f"./{folder}/{train}": python2_batch(pixels[:3], [1, 2, 3], key),
        f"{folder}/readme.html": b"x",
    }
    dataset = convert(tmp_path, make_tar(tmp_path / "cifar.tar.gz", files, "w:gz"))
    assert labels_of(dataset) == [1, 2, 3]
    for split, expected in {"all": [1, 2, 3, 7, 8], "test": [7, 8]}.items():
        options = [f"--split={split}", "--workers=1"]
        dataset = convert(tmp_path, tmp_path / "cifar.tar.gz", dest=f"{split}.zip", options=options)
        assert labels_of(dataset) == expected
        np.testing.assert_array_equal([image for image, _ in dataset], pixels[-len(expected) :].reshape(-1, 3, 32, 32))
    options = ["--split=validation"]
    fails_with(
        convert(tmp_path, tmp_path / "cifar.tar.gz", dest="v.zip", ok=False, options=options),
        "no validation data in it: choose --split=train or test or all",
    )


@pytest.mark.parametrize(
    ("protocol", "reason"), [(2, "it asks for '_codecs.encode'"), (0, "not a pickle of protocol 2")]
)
def test_repacked_cifar(protocol, reason, tmp_path):
    batch = pickle.dumps({"data": np.zeros([2, 3072], np.uint8), "labels": [0, 1]}, protocol=protocol)
    source = make_tar(tmp_path / "cifar.tar", {"cifar-10-batches-py/data_batch_1": batch})
    result = convert(tmp_path, source, ok=False)
    fails_with(result, f"--source={source}: not as CIFAR is published", f"data_batch_1: {reason}", "download it again")
    assert "network" not in result.stderr


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(packed, tmp_path):
    pixels = RNG.integers(0, 256, [4, 28, 28], dtype=np.uint8)
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    (tmp_path / f"train-images-idx3-ubyte{end}").write_bytes(pack(idx_file(pixels)))
    (tmp_path / f"train-labels-idx1-ubyte{end}").write_bytes(pack(idx_file(np.array([3, 1, 4, 1], np.uint8))))
    source = tmp_path / f"train-images-idx3-ubyte{end}"
    dataset = convert(tmp_path, source, options=["--channels=1", "--workers=1"])
    assert labels_of(dataset) == [3, 1, 4, 1]
    np.testing.assert_array_equal([dataset[i][0][0] for i in range(4)], pixels)


def test_folder_of_mnist(tmp_path):
    """Training and test images; labels compressed or not; single channels apart."""
    pixels = RNG.integers(0, 256, [5, 8, 8, 1], dtype=np.uint8)
    source = tmp_path / "mnist"
    source.mkdir()
    for part, start, stop in (("t10k", 0, 2), ("train", 2, 5)):
        (source / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_file(pixels[start:stop])))
        (source / f"{part}-labels-idx1-ubyte").write_bytes(idx_file(np.arange(start, stop, dtype=np.uint8)))
    assert labels_of(convert(tmp_path, source)) == [2, 3, 4]
    dataset = convert(tmp_path, source, dest="all.zip", options=["--split=all", "--channels=1", "--workers=1"])
    assert labels_of(dataset) == [2, 3, 4, 0, 1]
    np.testing.assert_array_equal([image[0] for image, _ in dataset], pixels[[2, 3, 4, 0, 1], :, :, 0])
    (source / "train-labels-idx1-ubyte").write_bytes(idx_file(np.zeros([2], np.uint8)))
    fails_with(convert(tmp_path, source, dest="b.zip", ok=False), "3 images, but labels of shape [2]")


def test_tar_of_class_folders(tmp_path):
    files = {f"{c}/{i}.png": encoded(image(8, 8, seed=i)) for c in ("dog", "cat") for i in range(2)}
    assert labels_of(convert(tmp_path, make_tar(tmp_path / "a.tar", files))) == [1, 1, 0, 0]
    files["dataset.json"] = json.dumps({"labels": [[name, 7] for name in files]}).encode()
    path = make_tar(tmp_path / "b.tar.gz", {f"./{name}": data for name, data in files.items()}, "w:gz")
    assert labels_of(convert(tmp_path, path, dest="b.zip")) == [7, 7, 7, 7]


def test_folders_of_tar_files_without_samples(tmp_path):
    """One is taken as it is by itself; of several, where classes might be is said."""
    files = {f"{c}/{i}.png": encoded(image(8, 8, seed=i)) for c in ("dog", "cat") for i in range(2)}
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    make_tar(tmp_path / "one" / "photos.tar", files)
    assert labels_of(convert(tmp_path, tmp_path / "one")) == [1, 1, 0, 0]
    for name in ("dog", "cat"):
        make_tar(tmp_path / "many" / f"{name}.tar", {f"{i}.png": encoded(image(8, 8, seed=i)) for i in range(2)})
    result = convert(tmp_path, tmp_path / "many", dest="many.zip", ok=False)
    assert "labels: none" in result.output and "no classes" in result.output
    assert "if each tar file is a class, unpack each into a folder of its name" in result.output


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_of_equal_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for seed in range(2):
            archive.writestr("a.png", encoded(image(8, 8, seed=seed)))
    dataset = convert(tmp_path, tmp_path / "x.zip")
    np.testing.assert_array_equal(
        [pixels for pixels, _ in dataset], [image(8, 8, seed=seed).transpose(2, 0, 1) for seed in range(2)]
    )


def test_webdataset_shards(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        files = {}
        for i in range(2):
            files[f"{shard}{i}.cls"] = str(10 * shard + i).encode()
            files[f"{shard}{i}.jpg"] = encoded(image(8, 8, seed=i), "jpeg")
            files[f"{shard}{i}.json"] = b"{}"
        make_tar(tmp_path / "shards" / f"{shard:06d}.tar", files)
    assert labels_of(convert(tmp_path, tmp_path / "shards")) == [0, 1, 10, 11]
    assert labels_of(convert(tmp_path, tmp_path / "shards" / "000001.tar", dest="one.zip")) == [10, 11]


def samples(*extras: tuple[str, bytes], count: int = 6) -> dict[str, bytes]:
    """Photos with classes 0 to 2, and further files each."""
    files = {}
    for i in range(count):
        files |= {f"{i:04d}.png": encoded(image(8, 8, seed=i)), f"{i:04d}.cls": str(i % 3).encode()}
        files |= {f"{i:04d}.{key}": data for key, data in extras}
    return files


def test_one_image_per_sample(tmp_path):
    """Masks, depths and second views are no further images."""
    mask = png(np.zeros([8, 8], np.uint8))
    source = make_tar(tmp_path / "masks.tar", samples(("seg.png", mask), ("DEPTH.PNG", mask)))
    dataset = convert(tmp_path, source)
    assert labels_of(dataset) == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(dataset[4][0], image(8, 8, seed=4).transpose(2, 0, 1))
    for key, others in ((None, "depth.png, seg.png"), ("SEG.png", "depth.png, png")):
        note = f"one image per sample: others beside it are left out ({others}; see --image-key)"
        assert open_source(source, Choice(image_key=key)).notes == [note]
    assert open_source(make_tar(tmp_path / "plain.tar", samples())).notes == []
    options = ["--image-key=SEG.png", "--workers=1"]
    assert convert(tmp_path, source, dest="masks.zip", options=options)[0][0].max() == 0
    options = ["--image-key=left.png"]
    fails_with(
        convert(tmp_path, source, dest="x.zip", ok=False, options=options),
        "no image left.png beside 0000.png: choose --image-key from depth.png, png, seg.png",
    )
    for extra, keys in (("PNG", "png, png"), ("jpg", "jpg, png")):
        source = make_tar(tmp_path / f"{extra}.tar", samples((extra, mask)))
        result = convert(tmp_path, source, dest=f"{extra}.zip", ok=False)
        fails_with(result, f"0000.png is one of several images ({keys}): choose by --image-key")
    views = {f"0.{side}.png": encoded(image(8, 8)) for side in ("left", "right")}
    result = convert(tmp_path, make_tar(tmp_path / "views.tar", {**views, "0.cls": b"1"}), dest="v.zip", ok=False)
    fails_with(result, "0.left.png is one of several images (left.png, right.png): choose by --image-key")


def test_labels_of_samples(tmp_path):
    """They are in a file .cls, or in a JSON file; texts are names, unless all are numbers."""
    files = {}
    for i, name in enumerate(["dog", "cat", "dog"]):
        record = json.dumps({"label": i, "species": name}).encode()
        files |= {f"{i}.jpg": encoded(image(8, 8, seed=i), "jpeg"), f"{i}.json": record, f"{i}.txt": b"7"}
    source = make_tar(tmp_path / "x.tar", files)
    assert labels_of(convert(tmp_path, source)) == [0, 1, 2]
    for key, expected in (("species", [1, 0, 1]), ("txt", [7, 7, 7])):
        dataset = convert(tmp_path, source, dest=f"{key}.zip", options=[f"--label-key={key}", "--workers=1"])
        assert labels_of(dataset) == expected
    files["1.json"] = b"{"
    source = make_tar(tmp_path / "damaged.tar", files)
    fails_with(convert(tmp_path, source, dest="d.zip", ok=False), "the JSON file beside 1.jpg is damaged")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for part in range(2):
        images = [{"bytes": encoded(image(8, 8, seed=i)), "path": None} for i in range(3)]
        table = pa.table({"image": images, "label": [part, 5, 6]})
        pq.write_table(table, tmp_path / "data" / f"train-{part:05d}-of-00002.parquet", row_group_size=2)
    dataset = convert(tmp_path, tmp_path / "data")
    assert labels_of(dataset) == [0, 5, 6, 1, 5, 6]
    np.testing.assert_array_equal(dataset[4][0], image(8, 8, seed=1).transpose(2, 0, 1))
    # Other columns of bytes, other kinds of bytes, names of classes, rows without an image.
    columns = {"thumbnail": [b"x", b"y"], "image": pa.array([encoded(image(8, 8)), None], pa.large_binary())}
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({**columns, "label": [1, 0]}).replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "named.parquet")
    result = convert(tmp_path, tmp_path / "named.parquet", dest="n.zip", ok=False, options=["--on-error=skip"])
    assert result.exit_code == 0 and "named.parquet[1]: cannot be read: no image in column image" in result.output
    assert labels_of(ImageFolderDataset(tmp_path / "n.zip")) == [1]
    with zipfile.ZipFile(tmp_path / "n.zip") as archive:
        assert json.loads(archive.read("report.json"))["classes"] == ["cat", "dog"]
    # Of another order of classes, and with the class in a column of another name.
    (tmp_path / "both").mkdir()
    pq.write_table(table, tmp_path / "both" / "a.parquet")
    names = {"info": {"features": {"target": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [encoded(image(8, 8))], "target": [1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "both" / "b.parquet")
    assert labels_of(convert(tmp_path, tmp_path / "both" / "b.parquet", dest="t.zip")) == [1]
    fails_with(convert(tmp_path, tmp_path / "both", dest="x.zip", ok=False), "b.parquet: other names of classes than")
    both = [tmp_path / "named.parquet", tmp_path / "both" / "b.parquet"]
    fails_with(convert(tmp_path, *both, dest="x.zip", ok=False), "b.parquet: other names of classes than")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    fails_with(
        convert(tmp_path, tmp_path / "other.parquet", dest="x.zip", ok=False), "no column of images", "there are a"
    )


def write_table(path: Path, columns: dict, features: dict | None = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    count = len(next(iter(columns.values())))
    pictures = [{"bytes": encoded(image(8, 8, seed=i)), "path": None} for i in range(count)]
    table = pa.table({"image": pictures, **columns})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def class_label(*names: str) -> dict:
    return {"_type": "ClassLabel", "names": names}


def test_columns_of_parquet_files(tmp_path):
    """A column called label goes before others of classes, an option before that; what is unclear is asked for."""
    columns = {"domain": [0, 1, 0, 1], "Label": [0, 1, 2, 3]}
    features = {"domain": class_label("photo", "sketch"), "Label": class_label(*"abcd")}
    source = write_table(tmp_path / "t.parquet", columns, features)
    result = convert(tmp_path, source, ok=False)
    assert result.exit_code == 0 and "column image, 4 images; labels: column Label\n" in result.output
    assert "4 classes: a (1), b (1), c (1), d (1)" in result.output
    dataset = convert(tmp_path, source, dest="d.zip", options=["--label-column=domain", "--workers=1"])
    assert labels_of(dataset) == [0, 1, 0, 1] and dataset.class_names == ["photo", "sketch"]
    fails_with(
        convert(tmp_path, source, dest="x.zip", ok=False, options=["--label-key=colour"]),
        "--label-key=colour: no such column: choose from domain, Label",
    )
    del columns["Label"]
    features = {"domain": class_label("photo", "sketch"), "kind": class_label("p", "q")}
    source = write_table(tmp_path / "u.parquet", {**columns, "kind": [0, 0, 1, 1]}, features)
    fails_with(convert(tmp_path, source, dest="x.zip", ok=False), "which column? choose --label-key from domain, kind")
    source = write_table(tmp_path / "v.parquet", {"img": [encoded(image(8, 8))], "label": [1]})
    fails_with(convert(tmp_path, source, dest="x.zip", ok=False), "which column? choose --image-key from image, img")
    assert labels_of(convert(tmp_path, source, dest="v.zip", options=["--image-key=img"])) == [1]


def test_labels_of_parquet_files(tmp_path):
    """Numbers as text and as floats, names, and lists of classes."""
    cases = {
        "text": (["10", "2", "0"], [10, 2, 0], None),
        "float": ([1.0, 0.0, 1.0], [1, 0, 1], None),
        "name": (["b", "a", "10"], [2, 1, 0], ["10", "a", "b"]),
        "vector": ([[0.5, 1.0], [0.0, 2.0], [1.0, 1.0]], [[0.5, 1.0], [0.0, 2.0], [1.0, 1.0]], None),
        "lists": ([[0, 2], [], [1]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]], None),
    }
    for name, (labels, expected, class_names) in cases.items():
        source = write_table(tmp_path / f"{name}.parquet", {"label": labels})
        dataset = convert(tmp_path, source, dest=f"{name}.zip")
        assert (labels_of(dataset), dataset.class_names) == (expected, class_names)
    for kind in ({"_type": "Sequence", "feature": class_label(*"abcd")}, [class_label(*"abcd")]):
        source = write_table(tmp_path / "m.parquet", {"label": [[0, 2], [1, 2]]}, {"label": kind})
        dataset = convert(tmp_path, source, dest="m.zip")
        assert labels_of(dataset) == [[1, 0, 1, 0], [0, 1, 1, 0]] and dataset.class_names == list("abcd")
        (tmp_path / "m.zip").unlink()


def test_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "db")) as env, env.begin(write=True) as transaction:
        for i in range(3):
            transaction.put(f"{i:03d}".encode(), encoded(image(8, 8, seed=i), "webp", lossless=True))
    dataset = convert(tmp_path, tmp_path / "db")
    assert not dataset.has_labels
    np.testing.assert_array_equal(dataset[2][0], image(8, 8, seed=2).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("names", "split", "expected", "note"),
    [
        (["default/test/0.tar", "default/train/0.tar"], "train", [1], "1 of 2 files: --split=train"),
        (["default/test/0.tar", "default/train/0.tar"], "test", [0], "1 of 2 files: --split=test"),
        (["extra-0.tar", "test-0.tar", "train-0.tar"], "all", [2, 1, 0], "tar shards"),
        (["extra-0.tar", "test-0.tar", "train-0.tar"], "train", [2], "1 of 3 files"),
        (["test-0.tar", "train_val-0.tar"], "all", [1, 0], "tar shards"),
        (["a.tar", "contest.tar"], "train", [0, 1], "tar shards"),
        (["Test-0.tar", "Train-0.tar", "VAL-0.tar"], "train", [1], "1 of 3 files: --split=train"),
        (["A/TEST/0.TAR", "A/TRAIN/0.TAR"], "test", [0], "1 of 2 files: --split=test"),
    ],
)
def test_splits(names, split, expected, note, tmp_path):
    for i, name in enumerate(names):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        make_tar(tmp_path / "src" / name, {"0.png": encoded(image(8, 8, seed=i))})
    result = convert(tmp_path, tmp_path / "src", ok=False, options=[f"--split={split}", "--workers=1"])
    assert result.exit_code == 0 and note in result.output
    dataset = ImageFolderDataset(tmp_path / "out.zip")
    assert len(dataset) == len(expected)
    for (pixels, _label), seed in zip(dataset, expected, strict=True):
        np.testing.assert_array_equal(pixels, image(8, 8, seed=seed).transpose(2, 0, 1))


def test_links(tmp_path):
    """Links to folders are followed; what cannot be followed is told."""
    source = folder_of_classes(tmp_path / "src")
    (source / "bird").symlink_to(folder_of_classes(tmp_path / "other") / "cat")
    assert labels_of(convert(tmp_path, source)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(ImageFolderDataset(source)) == 9
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(source / "cat" / "1.png", "a.png")
        os.link(source / "cat" / "1.png", tmp_path / "b.png")
        archive.add(tmp_path / "b.png", "b.png")
    fails_with(convert(tmp_path, tmp_path / "x.tar", dest="t.zip", ok=False), "b.png is a link")
    (source / "cat" / "up").symlink_to(source)
    fails_with(convert(tmp_path, source, dest="u.zip", ok=False), "this link leads back to a folder that contains it")


def test_folders_of_several_kinds(tmp_path):
    source = make_dataset(tmp_path / "src", {"preview.png": png(image(8, 8)), "train.tar": b"x"})
    fails_with(convert(tmp_path, source, ok=False), "holds images (such as preview.png) and other sources (train.tar)")
    inner = make_tar(tmp_path / "classes.tar", {"a.tar": b"x", "b.tar": b"x"})
    fails_with(convert(tmp_path, inner, ok=False), "no images in it", "(2 .tar)): unpack archives first")


def test_parts_that_are_not_there(tmp_path):
    """--split that would do nothing is refused."""
    source = make_tar(tmp_path / "a.tar", {"0.png": encoded(image(8, 8))})
    (tmp_path / "src").mkdir()
    make_tar(tmp_path / "src" / "b.tar", {"0.png": encoded(image(8, 8))})
    for path in (source, tmp_path / "src", make_dataset(tmp_path / "c", {"0.png": png(image(8, 8))})):
        result = convert(tmp_path, path, ok=False, options=["--split=test"])
        fails_with(result, f"--source={path}: nothing in it is called test: leave out --split=test")


def test_files_that_systems_leave_behind(tmp_path):
    files = {"a/1.png": png(image(8, 8)), "b/2.PNG": png(image(8, 8))}
    junk = {"__MACOSX/a/._1.png": b"x", "b/._2.png": b"x", ".trash/3.png": b"x", "Thumbs.db": b"x"}
    for source in (
        make_dataset(tmp_path / "s.zip", {**files, **junk}),
        make_dataset(tmp_path / "s", {**files, **junk}),
    ):
        assert labels_of(convert(tmp_path, source, dest=f"{source.name}.out.zip")) == [0, 1]


def test_bad_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    fails_with(convert(tmp_path, tmp_path / "empty", ok=False), "empty: no images in it (it is empty)")
    make_dataset(tmp_path / "texts", {"a.txt": b"x", "b.md": b"x"})
    fails_with(
        convert(tmp_path, tmp_path / "texts", ok=False),
        "no images in it (left out: 2 other files (1 .txt, 1 .md))",
    )
    fails_with(convert(tmp_path, tmp_path / "nowhere", ok=False), "nowhere: no such file or folder")
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros([2, 8, 8, 3], np.uint8))
    result = convert(tmp_path, tmp_path / "adm.npz", ok=False)
    fails_with(
        result, "no images in it (left out: 1 other file (1 .npy))", "ADM go to calculate_metrics.py as they are"
    )
    result = convert(tmp_path, make_dataset(tmp_path / "l.zip", {"0.npy": npy(np.zeros([4, 8, 8]))}), ok=False)
    fails_with(result, "latents are trained on as they are", "dataset_tool.py decode")
    (tmp_path / "odd.bin").write_bytes(b"odd stuff")
    fails_with(convert(tmp_path, tmp_path / "odd.bin", ok=False), "neither a ZIP", "b'odd stuf'")
    whole = make_tar(tmp_path / "x.tar", {f"{i}.png": encoded(image(64, 64)) for i in range(9)})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:40000])
    fails_with(convert(tmp_path, tmp_path / "cut.tar", ok=False), "cut.tar")
    assert not list(tmp_path.glob("out*"))


def test_damaged_containers(tmp_path):
    """Whatever is wrong with them is told in one line that names them."""
    files = {f"{i}.png": encoded(image(64, 64, seed=i)) for i in range(9)}
    tar = make_tar(tmp_path / "whole.tar", files).read_bytes()
    second = 512 * (1 + -(-len(files["0.png"]) // 512))
    packed = gzip.compress(tar)
    whole_zip = make_dataset(tmp_path / "whole.zip", files).read_bytes()
    batch = {"cifar-10-batches-py/data_batch_1": python2_batch(np.zeros([5, 3072], np.uint8), [1] * 5, "labels")}
    cifar = make_tar(tmp_path / "cifar.tar.gz", batch, "w:gz").read_bytes()
    containers = {
        "header.tar": damaged(tar, second),
        "joined.tar": tar + tar,
        "flipped.tar.gz": damaged(packed, len(packed) // 2),
        "cut.tar.gz": packed[: len(packed) // 2],
        "directory.zip": damaged(whole_zip, whole_zip.index(b"PK\1\2") + 1),
        "cut-cifar.tar.gz": cifar[: len(cifar) // 2],
        "flipped-cifar.tar.gz": damaged(cifar, len(cifar) // 2),
        "cut.idx.gz": gzip.compress(idx_file(np.zeros([5, 8, 8], np.uint8)))[:-9],
        "cut.idx": idx_file(np.zeros([5, 8, 8], np.uint8))[:-9],
        "flat.idx": idx_file(np.zeros([5, 0, 8], np.uint8)),
        "x.parquet": b"PAR1 and nothing else",
    }
    for name, data in containers.items():
        (tmp_path / name).write_bytes(data)
        fails_with(convert(tmp_path, tmp_path / name, ok=False), name)
        for left in tmp_path.glob("out*"):
            left.unlink()
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "data.mdb").write_bytes(bytes(9000))
    fails_with(convert(tmp_path, tmp_path / "db", ok=False), "db: damaged")


def test_truncated_lmdb(tmp_path):
    """Reading what is missing would kill the process."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "db")) as env, env.begin(write=True) as transaction:
        for i in range(30):
            transaction.put(f"{i:03d}".encode(), encoded(image(64, 64, seed=i)))
    os.truncate(tmp_path / "db" / "data.mdb", 100_000)
    fails_with(convert(tmp_path, tmp_path / "db", ok=False), "data.mdb is truncated, it should have")


def test_damaged_entries_can_be_left_out(tmp_path):
    data = make_dataset(tmp_path / "x.zip", {"a.png": png(image(8, 8)), "b.png": png(image(8, 8))}).read_bytes()
    (tmp_path / "x.zip").write_bytes(damaged(data, data.index(b"IDAT") + 9))
    make_dataset(tmp_path / "folder", {"b.png": png(image(8, 8))})
    (tmp_path / "folder" / "a.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "folder" / "c.png")  # reading it would wait for ever
    for name, reason in (("x.zip", "Bad CRC-32"), ("folder", "No such file")):
        result = convert(tmp_path, tmp_path / name, dest=f"{name}.out", ok=False, options=["--on-error=skip"])
        assert result.exit_code == 0, result.output
        assert f"left out: a.png: cannot be read: {reason}" in result.output
        assert len(ImageFolderDataset(tmp_path / f"{name}.out")) == 1
    fails_with(convert(tmp_path, tmp_path / "x.zip", ok=False), "a.png: cannot be read: Bad CRC-32")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_names_that_are_no_text(tmp_path):
    (tmp_path / "src").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "src") + b"/\xff.png")).write_bytes(b"broken")
    fails_with(convert(tmp_path, tmp_path / "src", ok=False), "\\xff.png: cannot be read")
