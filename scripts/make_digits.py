"""Make datasets/digits.zip from the handwritten digits that scikit-learn ships (needs `pip install scikit-learn`)."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

DEST = Path(__file__).parent.parent / "datasets" / "digits.zip"


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, date_time=(1998, 7, 1, 0, 0, 0)), data)


def main() -> None:
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)  # stored as 0..16
    labels = []
    with zipfile.ZipFile(DEST, "w", zipfile.ZIP_STORED) as archive:
        for idx, (image, label) in enumerate(zip(images, digits.target, strict=True)):
            name = f"{idx // 1000:05d}/img{idx:08d}.png"
            png = io.BytesIO()
            PIL.Image.fromarray(image).save(png, format="png", compress_level=0)
            add(archive, name, png.getvalue())
            labels.append([name, int(label)])
        add(archive, "dataset.json", json.dumps({"labels": labels}).encode())
    print(f"{DEST}: {len(labels)} images")


if __name__ == "__main__":
    main()
