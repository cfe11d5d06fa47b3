"""Images know what made them, and classes keep their names."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import (
    TINY,
    fails_with,
    images_in,
    make_dataset,
    png,
    run_cli,
    tiny_network,
)

from calculate_metrics import main as metrics_tool
from dnnlib.errors import UserError
from dnnlib.files import file_sha256
from dnnlib.util import code_version
from generate_images import main as generate
from snapshot_tool import main as snapshot_tool
from torch_utils import pictures
from torch_utils.pictures import save_image
from train_edm2 import main as train
from training.classes import find_classes
from training.config.generation import SamplingConfig
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.generation import generate_images
from training.generators import diffusion_generator
from training.provenance import format_seeds, read_png_text
from training.samplers import StackedRandomGenerator
from training.snapshot import load_network, read_metadata, save_network

NAMES = ["cat", "dog", "great white shark, man-eater", "Crane", "crane", "5", "emu", "emu", "owl", "eel"]


def ok(command, *args) -> str:
    result = run_cli(command, *args)
    assert result.exit_code == 0, result.output
    return result.output


def record_in(folder: Path) -> dict:
    return json.loads((folder / "generation.json").read_text())


def text_of(path: Path) -> dict:
    with PIL.Image.open(path) as image:
        return json.loads(image.info["openedm2"])


@pytest.fixture
def other_file(tmp_path) -> Path:
    path = tmp_path / "other.safetensors"
    save_network(path, tiny_network(seed=1), StandardRGBEncoder(), {})
    return path


@pytest.fixture
def named_file(tmp_path) -> Path:
    """A network whose ten classes have names."""
    path = tmp_path / "named.safetensors"
    save_network(path, tiny_network(), StandardRGBEncoder(), {"class_names": NAMES})
    return path


def test_images_say_what_made_them(snapshot_file, other_file, tmp_path):
    out, common = tmp_path / "out", ["--steps=2", "--guidance=2", "--guidance-interval=0.1,5", "--precision=fp32"]
    ok(generate, f"--net={snapshot_file}", f"--gnet={other_file}", f"--outdir={out}", "--seeds=0-2,7", *common)
    record = record_in(out)
    assert record["net"] == str(snapshot_file) and record["net_sha256"] == file_sha256(snapshot_file)
    assert record["gnet_sha256"] == file_sha256(other_file)
    sampler = record["sampler"]
    assert (sampler["solver"], sampler["num_steps"], sampler["guidance"]) == ("heun", 2, 2)
    assert sampler["guidance_interval"] == [0.1, 5] and record["precision"] == "fp32"
    assert record["seeds"] == "0-2,7" and record["class_policy"] == "random"
    assert record["encoder"] == {"name": "StandardRGBEncoder", "kwargs": {}}
    assert record["code_version"] == code_version()
    text = text_of(out / "000007.png")
    assert text.pop("seed") == 7 and 0 <= text.pop("class") < 10
    # The same, without the folders of this machine.
    local = {"net": "tiny.safetensors", "gnet": "other.safetensors"}
    assert text == {key: value for key, value in record.items() if key != "seeds"} | local
    assert str(tmp_path) not in json.dumps(text)


def test_interrupted_generation_continues(snapshot_file, tmp_path, monkeypatch):
    args, save, saved = [f"--net={snapshot_file}", "--steps=1", "--seeds=0-5", "--batch=2"], save_image, []

    def interrupted(path, *rest):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_image", interrupted)
        result = run_cli(generate, *args, f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 130 and result.stderr.strip() == (
        "Interrupted: the saved images are complete; repeat the command with --skip-existing to make the others"
    )
    assert "(3 are there)" in ok(generate, *args, f"--outdir={tmp_path / 'out'}", "--skip-existing")
    ok(generate, *args, f"--outdir={tmp_path / 'whole'}")
    assert sorted(tmp_path.glob("out/.*")) == [] and record_in(tmp_path / "out") == record_in(tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_more_seeds_extend_the_record(snapshot_file, tmp_path):
    args = [f"--net={snapshot_file}", f"--outdir={tmp_path / 'out'}", "--steps=1"]
    for seeds in ("0-3", "5", "2-6"):
        ok(generate, *args, f"--seeds={seeds}", "--skip-existing")
    assert record_in(tmp_path / "out")["seeds"] == "0-6"
    moved = shutil.copy(snapshot_file, tmp_path / "moved.safetensors")
    output = ok(generate, f"--net={moved}", *args[1:], "--seeds=0-7", "--skip-existing")
    assert "Generating 1 images" in output and "(7 are there)" in output
    # Without the record, the files say it themselves.
    (tmp_path / "out" / "generation.json").unlink()
    assert "do not say" not in ok(generate, *args, "--seeds=0-8", "--skip-existing")


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ("--net=other", "net_sha256"),
        ("--steps=2", "sampler num_steps 1 instead of 2"),
        ("--sampler=euler", "sampler solver heun instead of euler"),
        ("--class=3", "labels drawn from the seed instead of class 3"),
        ("--class-policy=balanced", "labels drawn from the seed instead of seed modulo 10"),
        ("--precision=bf16", "precision fp32 instead of bf16"),
    ],
)
def test_skip_existing_refuses_images_of_others(change, fact, forgotten, snapshot_file, other_file, tmp_path):
    out = tmp_path / "out"
    args = [f"--net={snapshot_file}", f"--outdir={out}", "--steps=1"]
    ok(generate, *args, "--seeds=0")
    if forgotten:
        (out / "generation.json").unlink()
    before = (out / "000000.png").read_bytes()
    change = f"--net={other_file}" if change == "--net=other" else change
    result = run_cli(generate, *args, change, "--seeds=0,1", "--skip-existing")
    fails_with(result, f"--skip-existing: {out / '000000.png'} was made by something else", fact, "another --outdir")
    assert not (out / "000001.png").exists() and (out / "000000.png").read_bytes() == before


def test_images_of_two_makers_in_one_folder(snapshot_file, other_file, tmp_path):
    """Those that take the place of others are told apart from those that stay."""
    out = tmp_path / "out"
    ok(generate, f"--net={snapshot_file}", f"--outdir={out}", "--steps=1", "--seeds=0-3")
    ok(generate, f"--net={other_file}", f"--outdir={out}", "--steps=1", "--seeds=2-5")
    record = record_in(out)
    assert (record["seeds"], record["net_sha256"]) == ("2-5", file_sha256(other_file))
    (earlier,) = record["earlier"]
    assert (earlier["seeds"], earlier["net_sha256"]) == ("0-1", file_sha256(snapshot_file))
    args = [f"--net={snapshot_file}", f"--outdir={out}", "--steps=1", "--skip-existing"]
    ok(generate, *args, "--seeds=0-1")
    fails_with(run_cli(generate, *args, "--seeds=0-2"), "000002.png was made by something else")
    ok(generate, *args[:-1], "--seeds=0-5")
    assert record_in(out)["seeds"] == "0-5" and "earlier" not in record_in(out)


def test_files_that_do_not_say_what_made_them(tmp_path):
    huge = bytearray(png(np.zeros([8, 8], np.uint8)))
    huge[16:24] = b"\x7f\xff\xff\xff" * 2  # width and height: more than Pillow opens
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    for data in (b"", b"text", bytes(huge), png(np.zeros([8, 8], np.uint8))):
        (tmp_path / "0.png").write_bytes(data)
        assert read_png_text(tmp_path / "0.png") is None


def test_images_of_unknown_origin(snapshot_file, tmp_path):
    out = tmp_path / "out"
    make_dataset(out, {"000001.png": png(np.zeros([8, 8], np.uint8)), "generation.json": b"[]"})
    args = [f"--net={snapshot_file}", f"--outdir={out}", "--steps=1", "--seeds=0-1", "--skip-existing"]
    fails_with(run_cli(generate, *args), f"{out / 'generation.json'}: not a record of generated images")
    (out / "generation.json").unlink()
    assert "Note: 1 of the images that are there do not say what made them" in ok(generate, *args)
    assert record_in(out)["seeds"] == "0"  # what it knows


def test_latents_have_the_record_alone(tmp_path):
    net, out = tmp_path / "raw.safetensors", tmp_path / "out"
    save_network(net, tiny_network(img_channels=2), RawLatentEncoder([0.0, 1.0], [1.0, 2.0]), {})
    ok(generate, f"--net={net}", f"--outdir={out}", "--seeds=0", "--steps=1")
    assert record_in(out)["encoder"]["kwargs"] == {"raw_mean": [0, 1], "raw_std": [1, 2]}
    args = [f"--net={net}", f"--outdir={out}", "--seeds=0-1", "--skip-existing"]
    fails_with(run_cli(generate, *args, "--steps=2"), "000000.npy was made by something else")


def test_metrics_save_images_with_their_record(snapshot_file, digits_ref, tmp_path):
    args = ["gen", f"--net={snapshot_file}", f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=3", "--repeat=2"]
    ok(metrics_tool, *args, f"--save-images={tmp_path / 'out'}", f"--outdir={tmp_path}", "--steps=1")
    record = record_in(tmp_path / "out")
    assert record["seeds"] == "0-5" and record["net_sha256"] == file_sha256(snapshot_file)
    assert text_of(tmp_path / "out" / "000000" / "000005.png")["seed"] == 5
    measured = [json.loads(line) for line in (tmp_path / "metric-fd_pixels.jsonl").read_text().splitlines()]
    assert [line["seeds"] for line in measured] == ["0-2", "3-5"] and measured[0]["encoder"] == record["encoder"]
    # Reading the folder has nothing to say about the record.
    assert "left out" not in ok(metrics_tool, "calc", f"--images={tmp_path / 'out'}", *args[2:4], "--num=3")


def test_saved_images_of_an_earlier_run(snapshot_file, other_file, digits_ref, tmp_path):
    """Half-written ones are deleted, and whole ones that something else has made are pointed out."""
    out = tmp_path / "out"
    args = [f"--net={snapshot_file}", "--steps=1"]
    measure = ["gen", *args, f"--ref={digits_ref}", "--metrics=fd_pixels", "--num=3", f"--save-images={out}"]
    leftover = make_dataset(out, {f"000000/.000001.png.{'0' * 16}.tmp": b"half"}) / "000000"
    assert f"Note: {out}" not in ok(metrics_tool, *measure) and len(list(leftover.iterdir())) == 3
    ok(generate, *args, f"--outdir={out}", "--seeds=3-4", "--subdirs")  # of the same
    (out / "generation.json").unlink()
    assert f"Note: {out}" not in ok(metrics_tool, *measure)
    ok(generate, f"--net={other_file}", *args[1:], f"--outdir={out}", "--seeds=8,7", "--subdirs")
    note = f"Note: {out} also holds 2 images that this does not make, such as 000000/000007.png"
    assert note in ok(metrics_tool, *measure)


def test_images_saved_from_python_say_what_made_them(snapshot_file, tmp_path):
    net, guide = load_network(snapshot_file).net, tiny_network(seed=1)
    args = dict(
        gnet=guide, outdir=tmp_path / "out", seeds=[1, 0, 7], class_idx=3, num_steps=2, guidance=1.5, verbose=False
    )
    for _batch in generate_images(net, **args):
        pass
    record = record_in(tmp_path / "out")
    assert (record["net"], record["gnet"], record["seeds"]) == ("Precond", "Precond", "0-1,7")
    assert record["sampler"] == {"function": "edm_sampler", "num_steps": 2, "guidance": 1.5}
    assert record["classes"] == [3] and record["encoder"]["name"] == "StandardRGBEncoder"
    assert record["net_precision"] == "fp32" and record["code_version"] == code_version()
    assert record["net_weights_sha256"] != record["gnet_weights_sha256"]
    text = text_of(tmp_path / "out" / "000007.png")
    assert text.pop("seed") == 7 and text.pop("class") == 3
    assert text == {key: value for key, value in record.items() if key != "seeds"}
    # The same weights are recognised, other ones and other options are told apart.
    for change, count in (({}, 0), (dict(gnet=tiny_network(seed=2)), 1), (dict(num_steps=3), 1)):
        for _batch in generate_images(load_network(snapshot_file).net, **{**args, "seeds": [0], **change}):
            pass
        assert len(record_in(tmp_path / "out").get("earlier", [])) == count
        for _batch in generate_images(net, **args):
            pass
    result = run_cli(generate, f"--net={snapshot_file}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--skip-existing")
    fails_with(result, "000000.png was made by something else")


def test_images_that_python_did_not_ask_for_are_not_in_the_record(tmp_path):
    def denoiser(x, sigma, cond=None):
        return x * 0

    spec = tiny_network().spec
    batches = generate_images(denoiser, spec=spec, outdir=tmp_path, seeds=range(4), max_batch_size=2, verbose=False)
    next(iter(batches))
    record = record_in(tmp_path)
    assert record["net"].endswith("denoiser") and record["seeds"] == "" and "net_weights_sha256" not in record
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], None),
        (["--class-policy=random"], None),
        (["--class-policy=balanced"], [seed % 10 for seed in range(8, 13)]),
        (["--class=3"], [3] * 5),
        (["--class=7,2,4"], [4, 7, 2, 4, 7]),
        (["--class=0-2"], [2, 0, 1, 2, 0]),
    ],
)
def test_classes(options, expected, snapshot_file, tmp_path):
    args = [f"--net={snapshot_file}", "--steps=1", *options]
    ok(generate, *args, f"--outdir={tmp_path / 'a'}", "--seeds=8-12")
    classes = [text_of(tmp_path / "a" / f"{seed:06d}.png")["class"] for seed in range(8, 13)]
    rnd = StackedRandomGenerator("cpu", range(8, 13))
    rnd.randn([5, 1, 8, 8])
    assert classes == (expected or rnd.randint(10, [5]).tolist())
    # An image depends on its seed alone.
    ok(generate, *args, f"--outdir={tmp_path / 'b'}", "--seeds=12,9", "--batch=1")
    for name, image in images_in(tmp_path / "b").items():
        assert np.abs(image.astype(int) - images_in(tmp_path / "a")[name]).max() <= 1
        assert text_of(tmp_path / "b" / name) == text_of(tmp_path / "a" / name)


def test_noise_does_not_depend_on_the_class():
    """Whatever chooses it, as many random numbers are drawn."""
    net, states = tiny_network(), []
    for sampling in (SamplingConfig(), SamplingConfig(class_idx="1,2"), SamplingConfig(class_policy="balanced")):
        generator, rnd = diffusion_generator(net, net.spec, sampling), StackedRandomGenerator("cpu", [5, 6])
        noise, cond = generator.noise(rnd), generator.condition(rnd)
        assert cond is not None and cond.sum() == 2
        states.append(torch.cat([noise.flatten(), rnd.randn([2, 3]).flatten()]))
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_policies_that_do_not_fit(snapshot_file, tmp_path):
    args = [f"--net={snapshot_file}", f"--outdir={tmp_path / 'out'}"]
    fails_with(run_cli(generate, *args, "--class=1", "--class-policy=random"), "leave out --class, or the policy")
    for text in ("cat", "1,cat", "Cat,2"):
        fails_with(run_cli(generate, *args, f"--class={text}"), "does not say what its classes are called", "0 to 9")
    save_network(tmp_path / "u.safetensors", tiny_network(label_dim=0), StandardRGBEncoder(), {})
    args[0] = f"--net={tmp_path / 'u.safetensors'}"
    fails_with(run_cli(generate, *args, "--class-policy=balanced"), "the network knows no classes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", (0,)),
        ("DOG", (1,)),
        ("great white shark, man-eater", (2,)),
        ('"great white shark, man-eater",dog', (2, 1)),
        ("Crane", (3,)),
        ("crane", (4,)),
        ("5", (5,)),
        ('"5"', (5,)),
        ("owl, 0-1,cat", (8, 0, 1, 0)),
    ],
)
def test_classes_by_name(text, expected):
    assert find_classes(text, 10, NAMES) == expected


def test_accents_in_names_of_classes():
    """macOS codes them in names of folders as two characters, keyboards as one."""
    assert find_classes("méduse", 2, ["chat", "méduse"]) == (1,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("emu", "--class=emu: 2 classes are called so: give a number of 6, 7"),
        ("CRANE", "--class=CRANE: 2 classes are called so: give a number of 3, 4"),
        ("cats", "--class=cats: no such class; the nearest are cat"),
        ("shark", "the nearest are great white shark, man-eater"),
        ("zebra", "--class=zebra: no such class; the nearest are"),
        ("10", "--class=10 is out of range: the classes are 0 to 9"),
        (",", "names no class"),
    ],
)
def test_names_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        find_classes(text, 10, NAMES)


def test_numbers_stay_numbers_where_names_look_like_them():
    assert find_classes("10", 11, ["0", "1", "10", *map(str, range(2, 10))]) == (10,)
    assert find_classes('"10"', 11, ["0", "1", "10", *map(str, range(2, 10))]) == (2,)


def test_a_number_that_is_also_a_name_is_pointed_out(tmp_path):
    net, names = tmp_path / "net.safetensors", ["0", "1", "10", *map(str, range(2, 9))]
    save_network(net, tiny_network(), StandardRGBEncoder(), {"class_names": names})
    args = [f"--net={net}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=1"]
    note = "Note: --class=3 is the number, of the class called 2; for the class called 3 write --class='\"3\"'"
    assert note in ok(generate, *args, "--class=3")
    assert "Note" not in ok(generate, *args, '--class="3"') + ok(generate, *args, "--class=0")
    assert text_of(tmp_path / "out" / "000000.png")["class_name"] == "0"


def test_names_of_classes_survive(tmp_path):
    """From folders through training into snapshots, model cards, images and contact sheets."""
    rng = np.random.default_rng(0)
    files = {f"{c}/{i}.png": png(rng.integers(0, 256, [8, 8], np.uint8)) for c in ("cat", "dog", "emu") for i in "01"}
    data = make_dataset(tmp_path / "photos", files)
    options = [*TINY, "--batch=16", "--duration=16", "--ema-std=0.1", "--preview=0"]
    ok(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", *options)
    snapshot = tmp_path / "run" / "network-snapshot-0000000-0.100.safetensors"
    assert load_network(snapshot).metadata["class_names"] == ["cat", "dog", "emu"]
    assert json.loads(ok(snapshot_tool, "inspect", snapshot, "--json"))["class_names"] == ["cat", "dog", "emu"]
    ok(snapshot_tool, "convert", snapshot, tmp_path / "net.pkl")
    assert read_metadata(tmp_path / "net.pkl")["class_names"] == ["cat", "dog", "emu"]
    ok(snapshot_tool, "export", snapshot, tmp_path / "hub", "--license=mit")
    assert "| Classes | 3: cat, dog, emu |" in (tmp_path / "hub" / "README.md").read_text()
    out = tmp_path / "out"
    ok(generate, f"--net={tmp_path / 'hub'}", f"--outdir={out}", "--class=dog,0", "--seeds=0-3", "--steps=1", f"--grid={tmp_path / 'g.png'}")  # fmt: skip
    texts = [text_of(out / f"{seed:06d}.png") for seed in range(4)]
    assert [(text["class"], text["class_name"]) for text in texts] == [(1, "dog"), (0, "cat")] * 2
    assert record_in(out)["classes"] == [1, 0]
    with PIL.Image.open(tmp_path / "g.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (2 * (64 + 14 + 8) - 8, 2 * 72 - 8)
    first, second = pixels[64:78, :64], pixels[64:78, 72:136]
    assert first.max() > 128 and second.max() > 128 and not np.array_equal(first, second)
    np.testing.assert_array_equal(first, pixels[150:164, :64])  # dog again


def test_without_labels_no_names(tmp_path):
    files = {f"{c}/{i}.png": png(np.full([8, 8], 9 * i, np.uint8)) for c in ("cat", "dog") for i in range(2)}
    data = make_dataset(tmp_path / "photos", files)
    options = [*TINY, "--batch=16", "--duration=16", "--ema-std=0.1", "--preview=0", "--cond=0"]
    ok(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", *options)
    metadata = read_metadata(tmp_path / "run" / "network-snapshot-0000000-0.100.safetensors")
    assert metadata.get("class_names") is None


def test_damaged_names_of_classes(tmp_path):
    with pytest.raises(UserError, match="class_names is not a list of names"):
        save_network(tmp_path / "x.safetensors", tiny_network(), StandardRGBEncoder(), {"class_names": [1, 2]})


def test_format_seeds():
    assert format_seeds([]) == ""
    assert format_seeds([3]) == "3"
    assert format_seeds([7, 0, 1, 2, 5, 6, 2]) == "0-2,5-7"
    assert format_seeds(range(50000)) == "0-49999"
