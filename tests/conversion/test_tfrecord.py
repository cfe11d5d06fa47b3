"""TFRecord files of FFHQ and CelebA-HQ, SVHN's files, and the crop of CelebA."""

import struct
import zlib

import numpy as np
import pytest
from conftest import fails_with, make_dataset, png
from sources import convert, labels_of

from training.conversion.tfrecord import crc32c

RNG = np.random.default_rng(0)
BITWISE = 0x82F63B78


def slow_crc(data: bytes) -> int:
    """By its definition, bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ BITWISE * (state & 1)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [0, 1, 4, 511, 512, 513, 2000])
def test_crc(size):
    data = RNG.bytes(size)
    assert crc32c(data) == slow_crc(data)
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720


def masked(data: bytes) -> bytes:
    crc = slow_crc(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def message(number: int, content: bytes) -> bytes:
    return bytes([number * 8 + 2]) + varint(len(content)) + content


def example(pixels: np.ndarray, packed: bool = True) -> bytes:
    """A serialised `Example` of an image [C, H, W]."""
    shape = [varint(n) for n in pixels.shape]
    integers = message(1, b"".join(shape)) if packed else b"".join(b"\x08" + n for n in shape)
    features = {b"shape": message(3, integers), b"data": message(1, message(1, pixels.tobytes()))}
    features[b"ratio"] = message(2, message(1, struct.pack("<f", 0.5)))
    return message(1, b"".join(message(1, message(1, k) + message(2, v)) for k, v in features.items()))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def images(count: int, size: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, [count, channels, size, size], dtype=np.uint8)


@pytest.mark.parametrize(("channels", "packed"), [(3, True), (3, False), (1, True)])
def test_file(tmp_path, channels, packed):
    pixels = images(3, 16, channels)
    source = tmp_path / "some-r04.tfrecords"
    source.write_bytes(b"".join(record(example(image, packed)) for image in pixels))
    dataset = convert(tmp_path, source)
    expected = pixels if channels == 3 else np.repeat(pixels, dataset.num_channels, axis=1)
    np.testing.assert_array_equal([image for image, _ in dataset], expected)


def test_folder_has_the_largest(tmp_path):
    folder = tmp_path / "ffhq"
    folder.mkdir()
    large = images(2, 16)
    for name, pixels in {"r03": images(4, 8), "r04": large}.items():
        (folder / f"ffhq-{name}.tfrecords").write_bytes(b"".join(record(example(image)) for image in pixels))
    dataset = convert(tmp_path, folder)
    np.testing.assert_array_equal([image for image, _ in dataset], large)
    one = convert(tmp_path, folder / "ffhq-r03.tfrecords", dest="small.zip")
    assert (one.resolution, len(one)) == (8, 4)


def test_damage(tmp_path):
    source = tmp_path / "a.tfrecords"
    data = b"".join(record(example(image)) for image in images(3, 16))
    source.write_bytes(data[:-20])
    fails_with(convert(tmp_path, source, ok=False), "a.tfrecords: damaged or truncated at record 2")
    flipped = bytearray(data)
    flipped[200] ^= 1  # a pixel
    source.write_bytes(flipped)
    fails_with(convert(tmp_path, source, ok=False), "a.tfrecords[0]", "checksum mismatch")
    source.write_bytes(record(example(images(1, 16)[0])[:300]))
    fails_with(convert(tmp_path, source, ok=False), "a.tfrecords[0]", "not an image of [C, H, W] bytes")
    source.write_bytes(record(message(1, message(1, message(1, b"data") + message(2, message(1, b""))))))
    fails_with(convert(tmp_path, source, ok=False), "not an image of [C, H, W] bytes")


def mat_element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def mat_file(**arrays: np.ndarray) -> bytes:
    """A MATLAB 5 file of bytes, compressed as SVHN's are."""
    parts = []
    for name, values in arrays.items():
        content = mat_element(6, struct.pack("<II", 9, 0)) + mat_element(5, np.int32(values.shape).tobytes())
        content += mat_element(1, name.encode().ljust(8, b"\0")[: len(name)]) + mat_element(2, values.tobytes("F"))
        packed = zlib.compress(mat_element(14, content))
        parts.append(struct.pack("<II", 15, len(packed)) + packed)
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + b"".join(parts)


def test_svhn(tmp_path):
    folder = tmp_path / "svhn"
    folder.mkdir()
    pixels = RNG.integers(0, 256, [32, 32, 3, 4], dtype=np.uint8)
    labels = np.array([[10], [1], [9], [2]], np.uint8)
    (folder / "train_32x32.mat").write_bytes(mat_file(X=pixels, y=labels))
    (folder / "test_32x32.mat").write_bytes(mat_file(X=pixels[..., :1], y=labels[:1]))
    dataset = convert(tmp_path, folder)
    assert labels_of(dataset) == [0, 1, 9, 2]
    np.testing.assert_array_equal([image for image, _ in dataset], pixels.transpose(3, 2, 0, 1))
    assert len(convert(tmp_path, folder / "test_32x32.mat", dest="test.zip")) == 1
    (folder / "train_32x32.mat").write_bytes(mat_file(X=pixels))
    fails_with(convert(tmp_path, folder, dest="x.zip", ok=False), "no file of SVHN with X and y")
    (folder / "train_32x32.mat").write_bytes(mat_file(X=pixels, y=labels)[:-50])
    fails_with(convert(tmp_path, folder, dest="x.zip", ok=False), "no file of SVHN with X and y, or damaged")


def test_crop_of_celeba(tmp_path):
    inside = np.zeros([218, 178, 3], np.uint8)
    inside[39:179, 19:159] = 200  # the middle 140x140
    source = make_dataset(tmp_path / "celeba.zip", {"000001.jpg.png": png(inside)})
    options = ["--transform=center-crop-celeba", "--resolution=64x64"]
    dataset = convert(tmp_path, source, options=options)
    assert dataset.resolution == 64 and (dataset[0][0] == 200).all()
    small = make_dataset(tmp_path / "small.zip", {"a.png": png(inside[:100])})
    fails_with(convert(tmp_path, small, dest="x.zip", options=options, ok=False), "small")
