"""Datasets: formats, labels, order, and what is said about damaged ones."""

import contextlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import DIGITS, GOLDEN, make_dataset, npy, png, random_images

import training.dataset.images
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset, RunSampler, begin_loader_process, collate, dataset_indices
from training.encoders import RawLatentEncoder, StabilityVAEEncoder, StandardRGBEncoder, encoder_for, final_channels

GOLDEN_SUBSETS = np.load(GOLDEN / "dataset_tool.npz")


def test_digits():
    dataset = ImageFolderDataset(DIGITS)
    assert (len(dataset), dataset.resolution, dataset.num_channels, dataset.label_dim) == (1797, 8, 1, 10)
    assert dataset.has_labels
    image, label = dataset[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == np.uint8
    assert label.tolist() == [1] + [0] * 9
    # Every stroke value of the source survives: 0..16 as 0..255.
    values = np.unique(np.stack([dataset[i][0] for i in range(100)]))
    assert values.tolist() == [round(v * 255 / 16) for v in range(17)]


@pytest.mark.parametrize("name", ["data.zip", "data"])
@pytest.mark.parametrize("channels", [None, 3, 4])
def test_pixels(tmp_path, name, channels):
    files = random_images(3, channels=channels)
    dataset = ImageFolderDataset(make_dataset(tmp_path / name, files))
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, [8, 8] if channels is None else [8, 8, channels], dtype=np.uint8)
    expected = expected[None] if channels is None else expected.transpose(2, 0, 1)
    np.testing.assert_array_equal(dataset[0][0], expected)
    assert dataset.num_channels == (channels or 1)


def test_folder_and_zip_are_the_same_dataset(tmp_path):
    files = random_images(5)
    labels = {name: i for i, name in enumerate(files)}
    folder = ImageFolderDataset(make_dataset(tmp_path / "data", files, labels))
    archive = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files, labels))
    assert folder.info() == archive.info()
    changed = {**files, "00000/img00000002.png": random_images(1, seed=9)["00000/img00000000.png"]}
    assert ImageFolderDataset(make_dataset(tmp_path / "changed", changed, labels)).info() != folder.info()
    assert ImageFolderDataset(make_dataset(tmp_path / "unlabeled", files)).info() != folder.info()


def test_compressed_zip_works(tmp_path):
    path = make_dataset(tmp_path / "data.zip", random_images(3), compression=zipfile.ZIP_DEFLATED)
    stored = make_dataset(tmp_path / "stored.zip", random_images(3))
    np.testing.assert_array_equal(ImageFolderDataset(path)[2][0], ImageFolderDataset(stored)[2][0])
    assert ImageFolderDataset(path).compressed and not ImageFolderDataset(stored).compressed
    assert not ImageFolderDataset(make_dataset(tmp_path / "folder", random_images(3))).compressed
    with zipfile.ZipFile(stored, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", '{"labels": null}')
    assert not ImageFolderDataset(stored).compressed  # only the images count


def test_unsupported_compression(tmp_path):
    path = make_dataset(tmp_path / "data.zip", random_images(1), compression=zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match="cannot read 00000/img00000000.png: ZIP compression method 14"):
        ImageFolderDataset(path)


def test_palette_and_bilevel_images(tmp_path):
    import io

    import PIL.Image

    files = {}
    for name, mode in [("palette", "P"), ("cmyk", "CMYK")]:
        f = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode).save(f, format="tiff")
        files[f"{name}.tiff"] = f.getvalue()
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files))
    for i in range(2):
        assert dataset[i][0][:, 0, 0].tolist() == [255, 0, 0]


def test_latents(tmp_path):
    latents = np.random.default_rng(0).normal(size=[3, 8, 4, 4]).astype(np.float32)
    files = {f"00000/img-mean-std-{i:08d}.npy": npy(x) for i, x in enumerate(latents)}
    for name in ("data.zip", "data"):
        dataset = ImageFolderDataset(make_dataset(tmp_path / name, files))
        assert dataset.dtype == np.float32
        np.testing.assert_array_equal(dataset[1][0], latents[1])


def test_labels_from_directories(tmp_path):
    files = {f"{c}/{i}.png": data for c in ("cat", "ant") for i, data in enumerate(random_images(2).values())}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files))
    assert dataset.label_dim == 2
    assert [dataset[i][1].argmax() for i in range(4)] == [0, 0, 1, 1]  # ant, cat
    flat = make_dataset(tmp_path / "flat", {f"{i}.png": data for i, data in enumerate(random_images(2).values())})
    assert not ImageFolderDataset(flat).has_labels


def test_vector_labels(tmp_path):
    files = random_images(2)
    labels = {name: [0.5, float(i)] for i, name in enumerate(files)}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files, labels))
    assert dataset.label_dim == 2
    assert dataset[1][1].tolist() == [0.5, 1.0]


def test_labels_ignored_or_null(tmp_path):
    files = random_images(2)
    path = make_dataset(tmp_path / "data", {**files, "dataset.json": b'{"labels": null}'})
    assert ImageFolderDataset(path).label_dim == 0
    assert ImageFolderDataset(DIGITS, use_labels=False)[0][1].shape == (0,)


@pytest.mark.parametrize(("count", "size", "seed"), [(100, 10, 0), (100, 10, 3), (50000, 20, 0), (7, 7, 0)])
def test_subsets(tmp_path, count, size, seed):
    # A dataset of `count` names whose pixels are never read but for the chosen ones.
    image = random_images(1)["00000/img00000000.png"]
    path = make_dataset(tmp_path / "data.zip", {f"{i:05d}.png": image for i in range(count)})
    dataset = ImageFolderDataset(path, max_size=size, random_seed=seed)
    chosen = [int(dataset._name(i).split(".")[0]) for i in range(size)]
    assert chosen == GOLDEN_SUBSETS[f"subset_of{count}_max{size}_seed{seed}"].tolist()
    assert len(dataset) == size


def test_xflip():
    plain, both = ImageFolderDataset(DIGITS), ImageFolderDataset(DIGITS, xflip=True)
    assert len(both) == 2 * len(plain)
    np.testing.assert_array_equal(both[5][0], plain[5][0])
    np.testing.assert_array_equal(both[1797 + 5][0], plain[5][0][:, :, ::-1])
    np.testing.assert_array_equal(both[1797 + 5][1], plain[5][1])
    with pytest.raises(IndexError):
        both[2 * 1797]


def test_cache_returns_the_same_images():
    cached, plain = ImageFolderDataset(DIGITS, cache=True), ImageFolderDataset(DIGITS)
    first = cached[3][0]
    first[:] = 0  # must not reach the cache
    np.testing.assert_array_equal(cached[3][0], plain[3][0])


def test_can_be_sent_to_another_process():
    dataset = ImageFolderDataset(DIGITS)
    dataset[0]  # the memory map is open
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[7][0], dataset[7][0])


def test_loader_processes_give_the_same_batches():
    def batches(**kwargs):
        sampler = RunSampler(1797, seed=0, start=0, batch=8, part=(0, 8), round_size=8)
        loader = torch.utils.data.DataLoader(
            ImageFolderDataset(DIGITS), batch_sampler=sampler, collate_fn=collate, **kwargs
        )
        return [images for images, _labels in (x for _, x in zip(range(3), loader, strict=False))]

    spawned = batches(num_workers=2, multiprocessing_context="spawn", worker_init_fn=begin_loader_process)
    for a, b in zip(batches(), spawned, strict=True):
        assert torch.equal(a, b)


PNGS = [(mode, size) for mode in ("L", "LA", "RGB", "RGBA") for size in ((1, 1), (7, 7), (64, 64))]


@pytest.mark.parametrize("decoder", ["pyspng", "Pillow"])
@pytest.mark.parametrize(("mode", "size"), PNGS)
def test_both_png_decoders(decoder, mode, size, tmp_path, monkeypatch):
    if decoder == "pyspng":
        pytest.importorskip("pyspng")
    else:
        monkeypatch.setattr(training.dataset, "pyspng", None)
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


# ---------------------------------------------------------------------------------------------------------
# Damaged data


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such dataset"):
        ImageFolderDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found"):
        ImageFolderDataset(tmp_path / "empty")


def test_damaged_directory(tmp_path):
    data = make_dataset(tmp_path / "whole.zip", random_images(3)).read_bytes()
    rng = np.random.default_rng(0)
    start = data.index(b"PK\1\2")
    for _ in range(500):
        changed = bytearray(data)
        for position in rng.integers(start, len(data), size=3):
            changed[position] = rng.integers(256)
        (tmp_path / "a.zip").write_bytes(changed)
        with contextlib.suppress(UserError):
            ImageFolderDataset(tmp_path / "a.zip")


def test_truncated_zip(tmp_path):
    path = tmp_path / "cut.zip"
    path.write_bytes(DIGITS.read_bytes()[:100000])
    with pytest.raises(UserError, match="cut.zip: not a complete ZIP file"):
        ImageFolderDataset(path)


@pytest.mark.parametrize("keep", [10, 60, 200])
def test_truncated_image_is_named(tmp_path, keep):
    files = random_images(3)
    files["00000/img00000001.png"] = files["00000/img00000001.png"][:keep]
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files))
    with pytest.raises(UserError, match=r"data.zip: cannot read 00000/img00000001.png: "):
        dataset[1]


def test_not_square(tmp_path):
    path = make_dataset(tmp_path / "data", {"a.png": png(np.zeros([8, 12, 3], np.uint8))})
    with pytest.raises(UserError, match="a.png is 12x8 with 3 channels, not square"):
        ImageFolderDataset(path)


@pytest.mark.parametrize("other", [np.zeros([16, 16, 3], np.uint8), np.zeros([8, 8], np.uint8)])
def test_unequal_images(tmp_path, other):
    files = {**random_images(2), "odd.png": png(other)}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files))
    with pytest.raises(UserError, match="odd.png is .* but 00000/img00000000.png is 8x8 with 3 channels"):
        dataset[2]


def test_verify_finds_unequal_sizes_without_decoding(tmp_path):
    good = ImageFolderDataset(make_dataset(tmp_path / "good.zip", random_images(3)))
    good.verify()
    files = {**random_images(2), "odd.png": png(np.zeros([16, 16, 3], np.uint8))}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files))
    with pytest.raises(UserError, match="odd.png is 16x16"):
        dataset.verify()


def test_wrong_resolution(tmp_path):
    with pytest.raises(UserError, match="the images are 8x8 with 1 channel, not 16x16"):
        ImageFolderDataset(DIGITS, resolution=16)


def test_deep_pixels_are_refused(tmp_path):
    path = make_dataset(tmp_path / "data", {"a.png": png(np.zeros([8, 8], np.uint16))})
    with pytest.raises(UserError, match="more than 8 bits"):
        ImageFolderDataset(path)


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
    ("json", "message"),
    [
        (b"{", "is not of the form"),
        (b"[]", "is not of the form"),
        (b'{"labels": [["00000/img00000000.png", 1]]}', "has no label for 1 images, such as 00000/img00000001.png"),
        (b'{"labels": [["00000/img00000000.png", -1], ["00000/img00000001.png", 0]]}', "integers from 0"),
        (b'{"labels": [["00000/img00000000.png", 1000000000], ["00000/img00000001.png", 0]]}', "integers from 0"),
        (b'{"labels": [["00000/img00000000.png", [NaN]], ["00000/img00000001.png", [0]]]}', "finite numbers"),
        (b'{"labels": [["00000/img00000000.png", []], ["00000/img00000001.png", []]]}', "finite numbers"),
        (b"[" * 100000, "is not of the form"),
        (b'{"labels": [["00000/img00000000.png", "a"], ["00000/img00000001.png", "b"]]}', "integers from 0"),
        (b'{"labels": [["00000/img00000000.png", [1, 2]], ["00000/img00000001.png", [1]]]}', "differ in length"),
    ],
)
def test_bad_labels(tmp_path, json, message):
    path = make_dataset(tmp_path / "data", {**random_images(2), "dataset.json": json})
    with pytest.raises(UserError, match=f"dataset.json.*{message}"):
        ImageFolderDataset(path)


# ---------------------------------------------------------------------------------------------------------
# Order of training


def test_each_pass_shows_every_image_once():
    order = dataset_indices(np.arange(300), 100, seed=1)
    for epoch in order.reshape(3, 100):
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(order[:100], order[100:200])
    assert not np.array_equal(order[:100], dataset_indices(np.arange(100), 100, seed=2))


def test_order_does_not_depend_on_the_split():
    whole = RunSampler(100, seed=0, start=48, batch=24, part=(0, 24), round_size=24)
    steps = [batch for batch, _ in zip(whole, range(5), strict=False)]
    parts = [iter(RunSampler(100, seed=0, start=48, batch=24, part=part, round_size=6)) for part in [(0, 12), (12, 24)]]
    for step in steps:
        assert step == [i for part in parts for _round in range(2) for i in next(part)]
    resumed = iter(RunSampler(100, seed=0, start=48 + 24 * 3, batch=24, part=(0, 24), round_size=24))
    assert next(resumed) == steps[3]


# ---------------------------------------------------------------------------------------------------------
# Encoders


def test_pixel_encoder():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    encoder = StandardRGBEncoder()
    z = encoder.encode(x)
    assert (z.min().item(), z.max().item()) == (-1, 1)
    assert torch.equal(encoder.decode(z), x)
    assert encoder.decode(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_encoder_follows_the_data(tmp_path):
    def dataset(name, latents):
        return ImageFolderDataset(make_dataset(tmp_path / name, {f"{i}.npy": npy(x) for i, x in enumerate(latents)}))

    assert isinstance(encoder_for(ImageFolderDataset(DIGITS)), StandardRGBEncoder)
    rng = np.random.default_rng(0)
    vae_latents = dataset("vae", rng.normal(size=[2, 8, 4, 4]).astype(np.float32))
    assert isinstance(encoder_for(vae_latents), StabilityVAEEncoder)
    assert final_channels(vae_latents) == 4
    raw = dataset(
        "raw", (rng.normal(size=[200, 3, 4, 4]) * [[[2]], [[3]], [[4]]] + [[[1]], [[0]], [[-1]]]).astype(np.float32)
    )
    encoder = encoder_for(raw)
    assert isinstance(encoder, RawLatentEncoder)
    x = torch.from_numpy(np.stack([raw[i][0] for i in range(200)]))
    z = encoder.encode_latents(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.full([3], 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(encoder.decode(z), x)
    constant = dataset("constant", np.ones([2, 3, 4, 4], np.float32))
    with pytest.raises(UserError, match="not constant"):
        encoder_for(constant)


def test_vae_latents_are_drawn_and_whitened():
    encoder = StabilityVAEEncoder()
    mean, std = torch.tensor(encoder.raw_mean), torch.tensor(encoder.raw_std)
    latents = torch.cat([mean, torch.zeros(4)]).reshape(1, 8, 1, 1).expand(2, 8, 3, 3)
    torch.testing.assert_close(encoder.encode_latents(latents), torch.zeros(2, 4, 3, 3), atol=1e-6, rtol=0)
    spread = torch.cat([mean, std]).reshape(1, 8, 1, 1).expand(2, 8, 3, 3)
    z = encoder.encode_latents(spread, randn_like=torch.ones_like)
    torch.testing.assert_close(z, torch.full([2, 4, 3, 3], 0.5))


def test_vae_pixels(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    encoder = StabilityVAEEncoder(vae_name=str(tmp_path / "vae"), batch_size=2)
    pixels = torch.randint(256, [3, 3, 16, 16], dtype=torch.uint8)
    raw = encoder.encode_pixels(pixels)
    assert raw.shape == (3, 8, 8, 8)
    with torch.inference_mode():
        expected = vae.eval().encode(pixels.float() / 255).latent_dist  # [0, 1], not [-1, 1]
    torch.testing.assert_close(raw, torch.cat([expected.mean, expected.std], dim=1), rtol=1e-4, atol=1e-5)
    decoded = encoder.decode(encoder.encode_latents(raw, randn_like=torch.zeros_like))
    with torch.inference_mode():
        image = vae.decode(expected.mean).sample.clamp(0, 1) * 255
    assert decoded.dtype == torch.uint8
    assert (decoded.float() - image).abs().max() < 1.01


def test_missing_vae_is_one_line(tmp_path):
    pytest.importorskip("diffusers")
    encoder = StabilityVAEEncoder(vae_name=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="could not be loaded") as err:
        encoder.decode(torch.zeros(1, 4, 2, 2))
    assert "\n" not in str(err.value)


def test_pixels_and_latents_do_not_mix(tmp_path):
    files = {**random_images(1), "b.npy": npy(np.zeros([3, 8, 8], np.float32))}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files))
    with pytest.raises(UserError, match="b.npy holds float32, but 00000/img00000000.png uint8"):
        dataset.verify()


def test_verify_finds_other_kinds_of_pixels(tmp_path):
    for i, odd in enumerate([np.zeros([8, 8], np.uint8), np.zeros([8, 8], np.uint16)]):
        dataset = ImageFolderDataset(make_dataset(tmp_path / f"{i}.zip", {**random_images(1), "odd.png": png(odd)}))
        with pytest.raises(UserError, match="odd.png"):
            dataset.verify()


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


def test_damaged_compressed_entry(tmp_path):
    path = make_dataset(tmp_path / "data.zip", random_images(2), compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.infolist()[1].header_offset
    data[offset + 60 : offset + 90] = b"\xff" * 30
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot read 00000/img00000001.png"):
        ImageFolderDataset(path).verify()


def test_verify_reads_headers_only(tmp_path, monkeypatch):
    latents = {f"{i}.npy": npy(np.zeros([8, 4, 4], np.float32)) for i in range(3)}
    for files in (latents, random_images(3)):
        dataset = ImageFolderDataset(make_dataset(tmp_path / f"{len(list(tmp_path.iterdir()))}.zip", files))
        with monkeypatch.context() as m:
            m.setattr(ImageFolderDataset, "_decode", lambda *args: 1 / 0)
            dataset.verify()
    odd = {**latents, "odd.npy": npy(np.zeros([8, 5, 5], np.float32))}
    with pytest.raises(UserError, match="odd.npy is 5x5 with 8 channels"):
        ImageFolderDataset(make_dataset(tmp_path / "odd.zip", odd)).verify()
