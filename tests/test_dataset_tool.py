"""dataset_tool.py: its options."""

import pytest
from conftest import assert_all_options, fails_with, run_cli
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
        (["--resolution=64"], "'64' is not of the form WxH"),
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
