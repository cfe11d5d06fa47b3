"""edit_images.py with an NVAE: every subcommand and option, what must hold for latents, and bad input."""

import json

import PIL.Image
import pytest
import torch
from conftest import DIGITS, assert_all_options, fails_with, make_dataset, random_images, run_cli

from dnnlib.files import file_sha256
from edit_images import main
from training.editing.vae import Editor, reconstruct, traverse

reconstruct_command, traverse_command = (main.commands[name] for name in ("reconstruct", "traverse"))


@pytest.fixture(scope="module")
def editor(nvae):
    return Editor(str(nvae), "cpu")


def run(*args):
    result = run_cli(main, *args)
    assert result.exit_code == 0, result.output


def test_all_options(nvae, tmp_path):
    common = [f"--net={nvae}", f"--data={DIGITS}", "--indices=0-2", "--device=cpu", "--offline"]
    sheet = f"--sheet={tmp_path / 'sheet.png'}"
    options = [*common, sheet, "--keep=3,1", "--temperature=0.7", f"--outdir={tmp_path / 'out'}"]
    run("reconstruct", *options)
    assert_all_options(reconstruct_command, options)
    assert [path.name for path in sorted((tmp_path / "out").glob("*.png"))] == [f"{i:06d}.png" for i in range(3)]
    with PIL.Image.open(tmp_path / "out" / "000000.png") as image:
        assert image.size == (8, 8)
    blended = f"--outdir={tmp_path / 'blended'}"
    run("interpolate", common[0], *common[1:4], sheet, "--frames=3", blended)
    run("interpolate", common[0], "--seeds=1-3", "--frames=2", blended)
    assert len(list((tmp_path / "blended").glob("*.png"))) == 3 + 3 + 2
    record = json.loads((tmp_path / "blended" / "edit.json").read_text())
    assert record["edit"] == "interpolate" and (record["seeds"], record["frames"]) == ("1-3", 2)
    assert record["net"] == str(nvae) and record["net_sha256"] == file_sha256(nvae)
    options = [f"--outdir={tmp_path / 'groups'}", "--groups=0,2", "--columns=3", "--temperature=0.5"]
    run("traverse", *common, *options)
    run("traverse", common[0], "--seeds=1,2", *options)
    assert_all_options(traverse_command, [*common, *options, "--seeds=1"])
    assert [path.name for path in sorted((tmp_path / "groups").glob("*.png"))] == ["g00-2x2.png", "g02-4x4.png"]


def test_what_latents_say(editor):
    images = editor.images_of(str(DIGITS), [3, 4])
    means = editor.encode(images)
    whole, sheet = reconstruct(editor, images, [3, 0])
    assert (whole == editor.decode(means)).all() and (sheet.images[2:4] == whole).all()
    assert (sheet.images[:2] == images.numpy()).all() and sheet.captions[::2] == ["image", "top 3", "top 0"]
    drawn = editor.encode(images, seeds=[5, 6])
    torch.testing.assert_close(drawn[0][1:], editor.encode(images[1:], seeds=[6])[0])
    assert not torch.allclose(drawn[0], means[0])


def test_interpolation_begins_and_ends_with_the_images(editor):
    images = editor.images_of(str(DIGITS), [0, 1])
    whole, _ = reconstruct(editor, images)
    row = editor.interpolate(editor.encode(images), 4)[0].numpy()
    for ours, theirs in [(row[0], whole[0]), (row[-1], whole[1])]:
        assert abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    same = editor.interpolate(editor.encode(images[:1].expand(2, -1, -1, -1)), 3).numpy()
    assert abs(same.astype(int) - whole[0].astype(int)).max() <= 1


def test_traversal_changes_one_group(editor):
    latents = editor.draw([1, 2])
    sheet = traverse(editor, latents, 0, 4)
    plain = editor.decode(latents)
    assert (sheet.images[::4] == plain).all() and sheet.columns == 4 and sheet.captions[1] == "g00 2x2"
    again = editor.draw([1, 2])
    assert all(torch.equal(a, b) for a, b in zip(latents, again, strict=True))


def test_bad_input(nvae, snapshot_file, tmp_path):
    common = [f"--data={DIGITS}", f"--sheet={tmp_path / 'x.png'}"]
    fails_with(run_cli(main, "reconstruct", f"--net={snapshot_file}", *common), "needs the latents of an NVAE")
    net = f"--net={nvae}"
    fails_with(run_cli(main, "reconstruct", net, *common, "--indices=5000"), "5000 is too large")
    fails_with(run_cli(main, "reconstruct", net, *common, "--keep=4"), "the network has 3 groups")
    blended = f"--outdir={tmp_path / 'blended'}"
    fails_with(run_cli(main, "interpolate", net, *common, blended, "--indices=1"), "two images are needed")
    fails_with(run_cli(main, "interpolate", net, *common, blended, "--rtol=1"), "--rtol has no effect on NVAE")
    colour = make_dataset(tmp_path / "colour.zip", random_images(2))
    fails_with(run_cli(main, "interpolate", net, f"--data={colour}", common[1], blended), "8x8 with 3 channels")
    fails_with(run_cli(main, "interpolate", net, common[0], "--sheet=x.jpg", blended), "ends in .png")
    outdir = f"--outdir={tmp_path / 'out'}"
    fails_with(run_cli(main, "traverse", net, outdir), "Give --data, or --seeds")
    fails_with(run_cli(main, "traverse", net, outdir, "--seeds=1", "--groups=7"), "the network has groups 0 to 2")
    fails_with(run_cli(main, "traverse", net, outdir, "--seeds=1", "--temperature=0"), "--temperature")
