"""dataset_tool.py: its options."""

import pytest
from conftest import fails_with
from sources import convert, folder_of_classes


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
        (["--labels=nowhere.csv"], "--labels=nowhere.csv: cannot be read"),
    ],
)
def test_bad_options(options, fragment, tmp_path):
    fails_with(convert(tmp_path, folder_of_classes(tmp_path / "src"), ok=False, options=options), fragment)
