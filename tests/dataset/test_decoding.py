"""PNG files, other images and arrays, whole and damaged."""

import io
import json
import re

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.PngImagePlugin
import pytest
from conftest import make_dataset, npy, png, random_images, run_cli
from sources import convert, image

import training.dataset.decoding
from calculate_metrics import main as calculate_metrics
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset
from training.metrics.images import open_images

PNGS = [(mode, size) for mode in ("L", "LA", "RGB", "RGBA") for size in ((1, 1), (7, 7), (64, 64))]


@pytest.mark.parametrize("decoder", ["pyspng", "Pillow"])
@pytest.mark.parametrize(("mode", "size"), PNGS)
def test_both_png_decoders(decoder, mode, size, tmp_path, monkeypatch):
    if decoder == "pyspng":
        pytest.importorskip("pyspng")
    else:
        monkeypatch.setattr(training.dataset.decoding, "pyspng", None)
    shape = [*size, {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]]
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels[::2] //= 16  # rows of both kinds of filters
    path = make_dataset(tmp_path / "d", {"0.png": png(pixels[:, :, 0] if mode == "L" else pixels)})
    np.testing.assert_array_equal(ImageFolderDataset(path)[0][0], pixels.transpose(2, 0, 1))
    data = (path / "0.png").read_bytes()
    middle = data.index(b"IDAT") + 8
    for damaged in (data[:middle], data[:30], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
        (path / "0.png").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read 0.png"):
            ImageFolderDataset(path)


def test_palette_and_bilevel_images(tmp_path):

    files = {}
    for name, mode in [("palette", "P"), ("cmyk", "CMYK")]:
        f = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode).save(f, format="tiff")
        files[f"{name}.tiff"] = f.getvalue()
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files))
    for i in range(2):
        assert dataset[i][0][:, 0, 0].tolist() == [255, 0, 0]


UPRIGHT = image(8, 8)
SIDEWAYS = PIL.Image.fromarray(UPRIGHT).transpose(PIL.Image.Transpose.ROTATE_90)  # as a camera on its side stores it


def saved(picture: PIL.Image.Image, kind: str = "png", **options) -> bytes:
    f = io.BytesIO()
    picture.save(f, format=kind, **options)
    return f.getvalue()


def with_text(key: str, value: str) -> PIL.PngImagePlugin.PngInfo:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt(key, value)
    return info


def turned(kind: str, **options) -> bytes:
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    return saved(SIDEWAYS, kind, exif=exif, **options)


def palette(**options) -> bytes:
    picture = PIL.Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    return saved(picture, **options)


WHITE, BLUE = np.full([8, 8, 3], 255), np.full([8, 8, 3], [0, 0, 255])
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
PICTURES = {
    "PNG, turned": (turned("png"), UPRIGHT),
    "PNG, turned, without filters": (turned("png", compress_level=0), UPRIGHT),
    "TIFF, turned": (turned("tiff"), UPRIGHT),
    "WebP, turned": (turned("webp", lossless=True), UPRIGHT),
    "PNG, turned by XMP": (saved(SIDEWAYS, pnginfo=with_text("XML:com.adobe.xmp", XMP.decode())), UPRIGHT),
    "PNG with damaged EXIF": (saved(PIL.Image.fromarray(UPRIGHT), exif=b"Exif\0\0nonsense"), UPRIGHT),
    "opaque palette": (palette(), BLUE),
    "transparent palette": (palette(transparency=1), WHITE),
    "half transparent palette": (palette(transparency=b"\xff\x80"), np.full([8, 8, 3], [127, 127, 255])),
    "transparent colour": (saved(PIL.Image.new("RGB", (8, 8), (0, 0, 255)), transparency=(0, 0, 255)), WHITE),
    "transparent colour elsewhere": (saved(PIL.Image.new("RGB", (8, 8), (0, 0, 255)), transparency=(9, 9, 9)), BLUE),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_one_reader(kind, tmp_path):
    """A picture is the same in training and conversion, upright and on white."""
    data, expected = PICTURES[kind]
    path = make_dataset(tmp_path / "src", {"0.tiff": data})  # Pillow looks at the contents
    np.testing.assert_allclose(ImageFolderDataset(path)[0][0], expected.transpose(2, 0, 1), atol=1)
    np.testing.assert_array_equal(convert(tmp_path, path)[0][0], ImageFolderDataset(path)[0][0])


def test_transparent_gray_stays_gray(tmp_path):
    data = saved(PIL.Image.new("L", (8, 8), 7), transparency=7)
    dataset = ImageFolderDataset(make_dataset(tmp_path / "src", {"0.png": data}))
    assert dataset.image_shape == (1, 8, 8) and dataset[0][0].min() == 255


def turned_photos() -> dict[str, bytes]:
    """Half of them are stored sideways."""
    files = {}
    for i in range(20):
        picture = PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, [2, 2, 3], dtype=np.uint8))
        exif = PIL.Image.Exif()
        exif[PIL.ExifTags.Base.Orientation] = 6 if i % 2 else 1
        files[f"{i:02d}.png"] = saved(picture.transpose(PIL.Image.Transpose.ROTATE_90) if i % 2 else picture, exif=exif)
    return files


def transparent_pictures() -> dict[str, bytes]:
    """Some have an alpha channel, others declare a colour transparent; one is hidden."""
    noise = np.random.default_rng(0).integers(0, 256, [20, 4, 4, 4], dtype=np.uint8)
    files = {f"{i:02d}.png": png(pixels if i % 2 else pixels[:, :, :3]) for i, pixels in enumerate(noise)}
    files["20.png"] = saved(PIL.Image.new("RGB", (4, 4), (0, 0, 255)), transparency=(0, 0, 255))
    return {**files, ".ipynb_checkpoints/21.png": png(noise[0, :, :, :3])}


@pytest.mark.parametrize("files", [turned_photos(), transparent_pictures()], ids=["turned", "transparent"])
def test_pictures_measured_against_their_conversion(files, tmp_path):
    photos, ref = make_dataset(tmp_path / "photos", files), tmp_path / "ref.safetensors"
    convert(tmp_path, photos)
    converted = ImageFolderDataset(tmp_path / "out.zip")
    metrics = ["--metrics=fd_pixels", "--device=cpu", "--workers=0"]
    for one, other in ((tmp_path / "out.zip", photos), (photos, tmp_path / "out.zip")):
        result = run_cli(calculate_metrics, "ref", f"--data={one}", f"--dest={ref}", *metrics)
        assert result.exit_code == 0, result.output
        options = [f"--images={other}", f"--ref={ref}", f"--num={len(converted)}"]
        result = run_cli(calculate_metrics, "calc", *options, *metrics, "--json")
        assert result.exit_code == 0, result.output
        record = json.loads(re.search("{.*}", result.stdout)[0])
        assert record["results"]["fd_pixels"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha(channels, tmp_path):
    """A channel to training, which says so; conversions and metrics put images on white."""
    values = np.arange(256, dtype=np.uint8)
    gray, alpha = np.meshgrid(values, values)
    pixels = np.stack([gray] * (channels - 1) + [alpha], axis=2)
    path = make_dataset(tmp_path / "src", {"0.png": png(pixels)})
    dataset, measured = ImageFolderDataset(path), open_images(path)
    assert dataset.num_channels == channels and dataset.notes[-1].startswith("alpha is a channel like the others")
    converted = convert(tmp_path, path, options=[f"--channels={channels - 1}"])
    assert measured.image_shape == (channels - 1, 256, 256) and measured.notes == []
    np.testing.assert_array_equal(measured[0][0], converted[0][0])


def test_deep_pixels_are_refused(tmp_path):
    path = make_dataset(tmp_path / "data", {"a.png": png(np.zeros([8, 8], np.uint16))})
    with pytest.raises(UserError, match="more than 8 bits"):
        ImageFolderDataset(path)


@pytest.mark.parametrize("keep", [10, 60, 200])
def test_truncated_image_is_named(tmp_path, keep):
    files = random_images(3)
    files["00000/img00000001.png"] = files["00000/img00000001.png"][:keep]
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files))
    with pytest.raises(UserError, match=r"data.zip: cannot read 00000/img00000001.png: "):
        dataset[1]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full([1, 4, 4], np.nan, np.float32), "a.npy: the latents hold NaN"),
        (np.zeros([0, 4, 4], np.float32), r"shape \[0, 4, 4\]"),
        (np.zeros([4, 4], np.float32), r"shape \[4, 4\]"),
        (np.zeros([4, 4, 4], np.int32), "found int32"),
        (np.array([{}]), "cannot read"),
    ],
)
def test_bad_latents(tmp_path, array, message):
    with pytest.raises(UserError, match=message):
        ImageFolderDataset(make_dataset(tmp_path / "data", {"a.npy": npy(array)}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 99999, 9999), }"
        + b" " * 40
        + b"\n",
    ],
)
def test_damaged_arrays(tmp_path, data):
    with pytest.raises(UserError, match="cannot read a.NPY: "):
        ImageFolderDataset(make_dataset(tmp_path / "data", {"a.NPY": data}))
