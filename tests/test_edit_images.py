"""edit_images.py: every command of denoisers, what it keeps, and bad input."""

import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DIGITS, assert_all_options, fails_with, images_in, make_dataset, random_images, run_cli

from edit_images import main as edit
from training.conditioning import DataSpec
from training.config.edm2 import TRAINING_PRESETS as EDM2_PRESETS
from training.config.score_sde import ScoreNetwork
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.uvit_presets import UVIT_PRESETS
from training.dataset.images import ImageFolderDataset
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.families import preset_network
from training.networks.score_sde import ScoreSDE
from training.snapshot import save_network

NETWORKS = {"edm2": EDM2_PRESETS["digits"], "ve": SCORE_PRESETS["digits-ve"], "vp": SCORE_PRESETS["digits-vp"], "uvit": UVIT_PRESETS["digits-uvit"]}  # fmt: skip
SAMPLING = ["--sampler=euler", "--steps=4"]


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A snapshot of a small network of each family."""
    folder, paths = tmp_path_factory.mktemp("nets"), {}
    for name, preset in NETWORKS.items():
        torch.manual_seed(0)
        net = preset_network(preset)
        paths[name] = folder / f"{name}.safetensors"
        save_network(paths[name], net, StandardRGBEncoder(*net.spec.pixel_range), {}, torch.float32)
    return paths


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A small network of coloured images, and some of them."""
    torch.manual_seed(0)
    network = ScoreNetwork(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=())
    net = ScoreSDE(DataSpec(channels=3, resolution=8), **network.to_json())
    folder = tmp_path_factory.mktemp("colour")
    save_network(folder / "net.safetensors", net, StandardRGBEncoder(*net.spec.pixel_range), {}, torch.float32)
    make_dataset(folder / "grey.zip", random_images(3, channels=None))
    return folder / "net.safetensors", make_dataset(folder / "colour.zip", random_images(3)), folder / "grey.zip"


def digits(indices: list[int]) -> np.ndarray:
    dataset = ImageFolderDataset(DIGITS, use_labels=False)
    return np.stack([dataset[i][0] for i in indices])


def results(folder) -> dict[str, np.ndarray]:
    return {
        name: image[None] if image.ndim == 2 else image.transpose(2, 0, 1) for name, image in images_in(folder).items()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_inpaint_keeps_what_is_known(nets, tmp_path, name):
    """Bit for bit, with networks of all families; and each fill is another."""
    sheet = tmp_path / "sheet.png"
    args = [
        f"--net={nets[name]}",
        f"--data={DIGITS}",
        "--indices=3,5",
        "--box=2,1,7,8",
        "--fills=3",
        "--seed=7",
        "--batch=4",
    ]
    args += [f"--outdir={tmp_path / 'out'}", f"--sheet={sheet}", *SAMPLING, "--offline"]
    result = run_cli(edit, "inpaint", *args)
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "out")
    assert sorted(found) == [f"{i:06d}-{k:02d}.png" for i in (3, 5) for k in range(3)]
    known = np.ones([8, 8], bool)
    known[1:8, 2:7] = False
    for i, image in zip((3, 5), digits([3, 5]), strict=True):
        fills = [found[f"{i:06d}-{k:02d}.png"] for k in range(3)]
        assert all((fill[:, known] == image[:, known]).all() for fill in fills)
        assert len({fill.tobytes() for fill in fills}) == 3
    with PIL.Image.open(sheet) as picture:
        assert picture.size[0] == 5 * 72 - 8
    # A fill depends on its image and the seed alone.
    result = run_cli(
        edit,
        "inpaint",
        *[a for a in args if "indices" not in a and "outdir" not in a],
        "--indices=5",
        f"--outdir={tmp_path / 'one'}",
    )
    assert result.exit_code == 0, result.output
    alone = results(tmp_path / "one")
    assert all(np.abs(alone[n].astype(int) - found[n]).max() <= 1 for n in alone)


def test_masks(nets, tmp_path):
    """Of a file, and by a ratio, which hides other pixels of each image."""
    mask = np.zeros([8, 8], np.uint8)
    mask[::2] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    args = [f"--net={nets['vp']}", f"--data={DIGITS}", "--indices=0,1", "--fills=1", *SAMPLING]
    assert (
        run_cli(edit, "inpaint", *args, f"--mask={tmp_path / 'mask.png'}", f"--outdir={tmp_path / 'file'}").exit_code
        == 0
    )
    found = results(tmp_path / "file")
    for image, name in zip(digits([0, 1]), sorted(found), strict=True):
        assert (found[name][:, ::2] == image[:, ::2]).all() and (found[name][:, 1::2] != image[:, 1::2]).mean() > 0.5
    assert run_cli(edit, "inpaint", *args, "--ratio=0.5", f"--outdir={tmp_path / 'ratio'}").exit_code == 0
    found = results(tmp_path / "ratio")
    changed = [found[name] != image for image, name in zip(digits([0, 1]), sorted(found), strict=True)]
    assert all(0.25 < part.mean() <= 0.5 for part in changed) and (changed[0] != changed[1]).any()


def test_colorize_keeps_the_brightness(colour, tmp_path):
    net, coloured, grey = colour
    for data in (coloured, grey):
        out = tmp_path / data.stem
        args = [
            f"--net={net}",
            f"--data={data}",
            "--indices=0-2",
            "--fills=2",
            "--seed=1",
            "--batch=8",
            f"--outdir={out}",
        ]
        result = run_cli(edit, "colorize", *args, f"--sheet={tmp_path / 'sheet.png'}", *SAMPLING)
        assert result.exit_code == 0, result.output
        dataset, found = ImageFolderDataset(data, use_labels=False), results(out)
        for i in range(3):
            known = dataset[i][0].astype(float).mean(axis=0)
            for k in range(2):
                fill = found[f"{i:06d}-{k:02d}.png"].astype(float)
                inside = ((fill > 0) & (fill < 255)).all(axis=0)  # what is not cut to the range of pixels
                assert np.abs(fill.mean(axis=0) - known)[inside].max(initial=0) <= 1
        assert (found["000000-00.png"] != found["000000-01.png"]).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_encode_and_back(nets, tmp_path, name):
    """The flow makes the image of its noise again."""
    args = [f"--net={nets[name]}", f"--data={DIGITS}", "--indices=2,4", "--rtol=1e-4", "--atol=1e-4", "--batch=2"]
    result = run_cli(edit, "encode", *args, f"--outdir={tmp_path / 'z'}", f"--sheet={tmp_path / 'sheet.png'}")
    assert result.exit_code == 0, result.output
    z = np.load(tmp_path / "z" / "000004.npy")
    assert z.shape == (1, 8, 8) and z.dtype == np.float32 and np.isfinite(z).all()
    result = run_cli(edit, "interpolate", *args, "--frames=2", f"--outdir={tmp_path / 'between'}")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "between")
    assert sorted(found) == [f"000002-000004-{k:02d}.png" for k in range(2)]
    for image, k in zip(digits([2, 4]), (0, 1), strict=True):
        assert np.abs(found[f"000002-000004-{k:02d}.png"].astype(int) - image).max() <= 2


def test_interpolate_between_seeds(nets, tmp_path):
    args = [
        f"--net={nets['edm2']}",
        "--seeds=5,6,7",
        "--frames=4",
        "--batch=3",
        f"--outdir={tmp_path / 'out'}",
        "--rtol=0.01",
        "--atol=0.01",
    ]
    result = run_cli(edit, "interpolate", *args, f"--sheet={tmp_path / 'sheet.png'}", "--class=3")
    assert result.exit_code == 0, result.output
    found = results(tmp_path / "out")
    assert len(found) == 8 and (found["000005-000006-03.png"] == found["000006-000007-00.png"]).all()


def test_every_option_is_executed():
    common = ["--data=x", "--indices=0", "--outdir=x", "--sheet=x", "--batch=1"]
    of_commands = {
        "inpaint": [*common, "--mask=x", "--box=1", "--ratio=1", "--fills=1", "--seed=1"],
        "colorize": [*common, "--fills=1", "--seed=1"],
        "encode": common,
        "interpolate": [*common, "--seeds=1", "--frames=1"],
    }
    for name, args in of_commands.items():
        command = edit.commands[name]
        shared = [
            f"{p.opts[0]}=x" if not p.is_flag else p.opts[0]
            for p in command.params
            if p.name not in {a[2:].split("=")[0] for a in args} | {"help"}
        ]
        assert_all_options(command, [*args, *shared])


def test_results_are_not_written_into_the_dataset(nets, tmp_path):
    """There, {index}.png of an NVAE's reconstructions could be an image."""
    data = make_dataset(tmp_path / "data", random_images(2))
    options = [f"--net={nets['vp']}", f"--data={data}", "--box=1,1,2,2"]
    for place in (data, data / "edited"):
        result = run_cli(edit, "inpaint", *options, f"--outdir={place}")
        fails_with(result, f"--outdir={place}: is inside --data={data}: choose another place")
    assert len(list(data.rglob("*"))) == 3  # a folder of two images, as before


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("inpaint", [], "what is to be filled in? Give one of --mask, --box and --ratio"),
        ("inpaint", ["--box=1,1,2"], "four numbers LEFT,TOP,RIGHT,BOTTOM, not 3"),
        ("inpaint", ["--box=1,1,9,2"], "must lie within 0,0,8,8 and not be empty"),
        ("inpaint", ["--box=1,1,2,2", "--ratio=0.5"], "Give one of --mask, --box and --ratio"),
        ("inpaint", ["--box=1,1,2,2", "--indices=5000"], "--indices: 5000 is too large"),
        ("inpaint", ["--mask=MASK"], "is 9x8, and the images are 8x8"),
        ("inpaint", ["--mask=TEXT"], "cannot be read as a picture"),
        ("inpaint", ["--mask=HUGE"], "cannot be read as a picture"),
        ("inpaint", ["--box=1,1,2,2", "--snr=1"], "--snr has no effect with --sampler=heun"),
        ("colorize", [], "colouring needs a network of 3 channels, and this one has 1"),
        ("encode", ["--sampler=heun"], "noise and images are matched by rk45: leave it out"),
        ("interpolate", ["--indices=3"], "to blend, two images are needed"),
        ("interpolate", ["--seeds=1,2"], "which images? Give --data, or --seeds"),
    ],
)
def test_bad_input(nets, tmp_path, command, options, message):
    PIL.Image.new("L", (9, 8)).save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("x")
    huge = bytearray((tmp_path / "mask.png").read_bytes())
    huge[16:24] = b"\x7f\xff\xff\xff" * 2  # width and height
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(huge)
    places = {"MASK": str(tmp_path / "mask.png")} | {k: str(tmp_path / f"{k.lower()}.png") for k in ("TEXT", "HUGE")}
    options = [
        option.replace(key, place) for option in options for key, place in places.items() if key in option
    ] or options
    result = run_cli(edit, command, f"--net={nets['vp']}", f"--data={DIGITS}", f"--outdir={tmp_path / 'out'}", *options)
    fails_with(result, message)
    assert not (tmp_path / "out").exists()


def test_other_networks(nets, colour, tmp_path):
    rest = [f"--outdir={tmp_path / 'out'}", "--box=1,1,2,2"]
    fails_with(
        run_cli(edit, "inpaint", f"--net={nets['vp']}", f"--data={colour[1]}", *rest),
        "images of 8x8 with 3 channels, but the network knows 8x8 with 1",
    )
    latent = tmp_path / "latent.safetensors"
    save_network(latent, preset_network(NETWORKS["vp"]), RawLatentEncoder([0.0], [1.0]), {})
    fails_with(run_cli(edit, "inpaint", f"--net={latent}", f"--data={DIGITS}", *rest), "works on latents")
