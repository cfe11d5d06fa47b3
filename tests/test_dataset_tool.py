"""dataset_tool.py: its options."""

import json
import zipfile

import pytest
from conftest import assert_all_options, fails_with, make_dataset, run_cli
from sources import convert, encoded, folder_of_classes, image, labels_of, make_tar

from dataset_tool import convert as convert_command
from dataset_tool import main as dataset_tool
from training.dataset.images import ImageFolderDataset


def test_all_options_of_convert(tmp_path):
    files = {}
    for i in range(3):
        picture = encoded(image(20, 30, seed=i))
        files |= {f"{i}.cls": b"1", f"{i}.mask.png": picture, f"{i}.png": picture}
    source = make_tar(tmp_path / "train.tar", files)
    (tmp_path / "labels.csv").write_text("name,age,sex\n0,30,f\n1,40,m\n")
    args = [f"--source={source}", f"--dest={tmp_path / 'out'}", "--max-images=2", "--transform=center-crop"]
    args += ["--resolution=8x8", "--channels=1", "--range=0,4095", f"--labels={tmp_path / 'labels.csv'}"]
    args += [
        "--image-key=png",
        "--label-key=sex",
        "--split=train",
        "--validation=1",
        "--keep-names",
        "--workers=1",
        "--on-error=skip",
        "--resume",
    ]
    assert_all_options(convert_command, args)
    result = run_cli(dataset_tool, "convert", *args)
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(tmp_path / "out")
    assert (labels_of(dataset), dataset.class_names, dataset.image_shape) == ([0, 1], ["f", "m"], (1, 8, 8))


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--resolution=64x"], "'64x' is not of the form WxH"),
        (["--resolution=0x8"], "'0x8' is not of the form"),
        (["--resolution=99999x99999"], "above 8192x8192"),
        (["--transform=center-crop"], "needs --resolution"),
        (["--transform=center-crop", "--resolution=8x4"], "must be NxN"),
        (["--transform=center-crop-wide", "--resolution=4x8"], "for wide images"),
        (["--transform=bogus"], "--transform"),
        (["--max-images=0"], "--max-images"),
        (["--range=0"], "'0' is not of the form LO,HI"),
        (["--range=9,1"], "the first number must be below the second"),
        (["--range=0,inf"], "the first number must be below the second, both finite"),
        (["--image-key=png"], "--image-key=png: --source="),
        (["--labels=nowhere.csv"], "--labels=nowhere.csv: cannot be read"),
    ],
)
def test_bad_options(options, fragment, tmp_path):
    fails_with(convert(tmp_path, folder_of_classes(tmp_path / "src"), ok=False, options=options), fragment)


def test_resolution_is_one_number_or_two(tmp_path):
    source = folder_of_classes(tmp_path / "src")
    assert convert(tmp_path, source, options=["--resolution=4"]).image_shape == (3, 4, 4)


def test_limits_that_leave_classes_out_are_noted(tmp_path, vae):
    source = folder_of_classes(tmp_path / "src", count=8, size=(16, 16))
    lines = {
        5: "only the first 5 of 16 images, which have 1 of 2 classes: for all classes, leave --max-images out",
        9: "only the first 9 of 16 images, which have 2 of 2 classes",
    }
    for limit, line in lines.items():
        result = convert(tmp_path, source, dest=f"{limit}.zip", ok=False, options=[f"--max-images={limit}"])
        assert f"  {line}\n" in result.output
        with zipfile.ZipFile(tmp_path / f"{limit}.zip") as archive:
            assert line in json.loads(archive.read("report.json"))["notes"]
    assert "only the first" not in convert(tmp_path, source, dest="all", ok=False, options=["--max-images=16"]).output
    assert (
        "5 images, 1 class: cat (5)" in convert(tmp_path, source, dest="5", ok=False, options=["--max-images=5"]).output
    )
    args = [f"--source={tmp_path / 'all'}", f"--dest={tmp_path / 'latents'}", f"--encoder={vae}", "--max-images=3"]
    result = run_cli(dataset_tool, "encode", *args, "--device=cpu")
    assert "Note: only the first 3 of 16 images, which have 1 of 2 classes" in result.output


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--resolution=24"], 2),
        (["--resolution=20", "--transform=center-crop"], 1),
        (["--resolution=18", "--transform=center-crop"], 0),
        (["--resolution=24", "--transform=center-crop-dhariwal"], 2),
        (["--resolution=24x20", "--transform=center-crop-wide"], 0),  # leaves them out
    ],
)
def test_enlarging_is_noted(options, count, tmp_path):
    sizes = {"a.png": (20, 30), "b.png": (18, 40), "c.png": (60, 60)}
    source = make_dataset(tmp_path / "src", {name: encoded(image(*size)) for name, size in sizes.items()})
    output = convert(tmp_path, source, ok=False, options=options).output
    assert ("were enlarged" in output) == (count > 0)
    assert count == 0 or f"Note: {count} of 3 images were enlarged, the smallest from 18 pixels" in output
