"""Images as people have them, and the commands of dataset_tool.py on them."""

import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
from conftest import make_dataset, run_cli

from dataset_tool import main as dataset_tool
from training.dataset.images import ImageFolderDataset


def image(height: int = 20, width: int = 30, seed: int = 0, channels: int | None = 3) -> np.ndarray:
    shape = [height, width] if channels is None else [height, width, channels]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "png", **kwargs) -> bytes:
    f = io.BytesIO()
    PIL.Image.fromarray(pixels).save(f, format=kind, **kwargs)
    return f.getvalue()


def folder_of_classes(path: Path, count: int = 3, size: tuple[int, int] = (8, 8)) -> Path:
    files = {f"{c}/{i}.png": encoded(image(*size, seed=i)) for c in ("dog", "cat") for i in range(count)}
    return make_dataset(path, files)


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def idx_file(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def python2_batch(pixels: np.ndarray, labels: list[int], label_key: str) -> bytes:
    """A batch as Python 2 pickled it: short texts and bytes are strings."""

    def short(text: str) -> bytes:
        return pickle.SHORT_BINSTRING + bytes([len(text)]) + text.encode()

    array = pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n" + pickle.GLOBAL + b"numpy\nndarray\n"
    array += pickle.BININT1 + b"\0" + pickle.TUPLE1 + short("b") + pickle.TUPLE3 + pickle.REDUCE
    dtype = pickle.GLOBAL + b"numpy\ndtype\n" + short("u1") + pickle.BININT1 + b"\0" + pickle.BININT1 + b"\1"
    dtype += pickle.TUPLE3 + pickle.REDUCE + pickle.MARK + pickle.BININT1 + b"\3" + short("|")
    dtype += pickle.NONE * 3 + pickle.BININT + b"\xff" * 4 + pickle.BININT + b"\xff" * 4 + pickle.BININT1 + b"\0"
    dtype += pickle.TUPLE + pickle.BUILD
    shape = b"".join(pickle.BININT + struct.pack("<i", n) for n in pixels.shape) + pickle.TUPLE2
    data = pixels.tobytes()
    array += pickle.MARK + pickle.BININT1 + b"\1" + shape + dtype + pickle.NEWFALSE
    array += pickle.BINSTRING + struct.pack("<I", len(data)) + data + pickle.TUPLE + pickle.BUILD
    numbers = pickle.EMPTY_LIST + pickle.MARK + b"".join(pickle.BININT1 + bytes([n]) for n in labels) + pickle.APPENDS
    items = short("data") + array + short(label_key) + numbers
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def damaged(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def convert(tmp_path: Path, *sources, dest: str = "out.zip", ok: bool = True, options=("--workers=1",)):
    args = [f"--source={source}" for source in sources]
    result = run_cli(dataset_tool, "convert", *args, f"--dest={tmp_path / dest}", *options)
    if not ok:
        return result
    assert result.exit_code == 0, result.output
    return ImageFolderDataset(tmp_path / dest)


def check(path: Path, *options, exit_code: int = 0) -> dict:
    result = run_cli(dataset_tool, "check", path, "--json", "--timing=0", *options)
    assert result.exit_code == exit_code, result.output
    return json.loads(result.output)


def labels_of(dataset: ImageFolderDataset) -> list:
    return [dataset.get_stored_label(i) for i in range(len(dataset))]
