"""Parts of a dataset."""

import hashlib
import pickle

import numpy as np
from conftest import make_dataset, random_images

from training.dataset.images import ImageFolderDataset
from training.dataset.part import Part


def test_rule():
    names = [f"00000/img{i:08d}.png" for i in range(2000)]
    held_out = Part(0.2, 5, held_out=True).has(names)
    assert 340 < held_out.sum() < 460  # standard deviation 18
    first = hashlib.sha256(b"5\0" + names[0].encode()).digest()
    assert held_out[0] == (int.from_bytes(first[:8], "big") / 2**64 < 0.2)
    assert np.array_equal(Part(0.2, 5, held_out=False).has(names), ~held_out)
    assert np.array_equal(Part(0.2, 5, held_out=True).has(names[::-1])[::-1], held_out)
    assert (Part(0.3, 5, held_out=True).has(names) >= held_out).all()
    assert not np.array_equal(Part(0.2, 6, held_out=True).has(names), held_out)


def test_dataset(tmp_path):
    """A folder and a ZIP file are shared out alike, mirrored copies with their images, and labels as they are."""
    files = random_images(40)
    labels = {name: i % 3 for i, name in enumerate(files)}
    parts = {}
    for path in (make_dataset(tmp_path / "x.zip", files, labels), make_dataset(tmp_path / "x", files, labels)):
        for held_out in (True, False):
            data = ImageFolderDataset(path, xflip=True, part=Part(0.3, 0, held_out))
            data = pickle.loads(pickle.dumps(data))
            names = [data.name(i) for i in range(len(data))]
            assert names[: len(names) // 2] == names[len(names) // 2 :] and data.label_dim == 3
            assert all(data.get_label(i).argmax() == labels[name] for i, name in enumerate(names))
            assert parts.setdefault(held_out, names) == names
    assert set(parts[True]) | set(parts[False]) == set(files) and not set(parts[True]) & set(parts[False])
