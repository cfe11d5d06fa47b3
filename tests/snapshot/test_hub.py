"""Folders for the Hugging Face hub."""

import json

import numpy as np
import safetensors.torch
import torch
from conftest import GOLDEN, fails_with, images_in, run_cli, tiny_network

from generate_images import main as generate
from snapshot_tool import main as snapshot_tool
from training.encoders import StandardRGBEncoder
from training.snapshot import load_network, save_network
from training.snapshot.layout import newest_of_run


def test_export(run, tmp_path):
    source = run / "network-snapshot-0000003-0.100.safetensors"
    folder = tmp_path / "model"
    fails_with(run_cli(snapshot_tool, "export", source, folder), "under which licence? Give --license")
    assert run_cli(snapshot_tool, "export", source, folder, "--license=mit", "--dtype=fp32").exit_code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    assert (
        card.startswith("---\nlicense: mit\n")
        and "8 x 8 x 1 images" in card
        and "| Trained on | 3,072 images |" in card
    )
    before, after = load_network(source), load_network(folder)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(before.net(x, torch.tensor(1.0)), after.net(x, torch.tensor(1.0)))
    assert after.metadata == {**before.metadata, "license": "mit"}
    result = run_cli(generate, f"--net={folder}", f"--outdir={tmp_path / 'out'}", "--seeds=1", "--steps=1")
    assert result.exit_code == 0, result.output
    # Weights without the JSON block in their header are enough, with config.json beside them.
    safetensors.torch.save_file(safetensors.torch.load_file(folder / "model.safetensors"), folder / "model.safetensors")
    assert load_network(folder).metadata == after.metadata
    # Over an export, whole or not.
    (folder / "config.json").unlink()
    assert run_cli(snapshot_tool, "export", folder / "model.safetensors", folder).exit_code == 2  # names no network
    assert run_cli(snapshot_tool, "export", source, folder, "--license=mit").exit_code == 0
    assert run_cli(snapshot_tool, "export", folder, folder).exit_code == 0  # knows its licence
    assert load_network(folder).metadata == after.metadata
    # Not over the model of another project.
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    weights = (folder / "model.safetensors").read_bytes()
    fails_with(run_cli(snapshot_tool, "export", source, folder, "--license=mit"), "config.json: format version None")
    assert (folder / "model.safetensors").read_bytes() == weights
    toy = GOLDEN / "official" / "toy-clsA-layers03-dim32.pkl"
    fails_with(run_cli(snapshot_tool, "export", toy, tmp_path / "toy", "--license=mit"), "ToyModel makes no images")


def test_licence_of_published_networks(tmp_path):
    source = GOLDEN / "official" / "edm2-img512-xs-uncond-2147483-0.015.pkl"
    assert run_cli(snapshot_tool, "convert", source, tmp_path / "a.safetensors").exit_code == 0
    assert run_cli(snapshot_tool, "export", tmp_path / "a.safetensors", tmp_path / "model").exit_code == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card and "NVIDIA's" in card and "latents of stabilityai/sd-vae-ft-mse" in card
    # A network of our own is not NVIDIA's, whatever its name.
    save_network(tmp_path / "edm2-img64-mine.pkl", tiny_network(), StandardRGBEncoder(), {"license": "mit"})
    assert run_cli(snapshot_tool, "export", tmp_path / "edm2-img64-mine.pkl", tmp_path / "mine").exit_code == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "license: mit" in card and "NVIDIA" not in card
    save_network(tmp_path / "edm2-img64-mine.pkl", tiny_network(), StandardRGBEncoder(), {})
    fails_with(
        run_cli(snapshot_tool, "export", tmp_path / "edm2-img64-mine.pkl", tmp_path / "m"), "under which licence?"
    )


def test_the_folder_of_a_run_is_its_newest_snapshot(run, tmp_path):
    newest = run / "network-snapshot-0000003-0.100.safetensors"
    result = run_cli(generate, f"--net={run}", f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2")
    assert result.exit_code == 0 and f"Note: {run}: its newest snapshot is {newest.name}\n" in result.output
    run_cli(generate, f"--net={newest}", f"--outdir={tmp_path / 'same'}", "--seeds=0", "--steps=2")
    images = [images_in(tmp_path / name)["000000.png"] for name in ("out", "same")]
    np.testing.assert_array_equal(*images)
    assert json.loads(run_cli(snapshot_tool, "inspect", run, "--json").output)["file"] == str(newest)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "training_options.json").write_text("{}")
    result = run_cli(generate, f"--net={begun}", f"--outdir={tmp_path / 'none'}")
    fails_with(result, f"{begun}: a training run without a snapshot yet")
    # Where there are copies for the published tools, the native file counts.
    for name in ("network-snapshot-0000010-0.100.pkl", "network-snapshot-0000009-0.100.safetensors"):
        (begun / name).touch()
    assert newest_of_run(str(begun)) == begun / "network-snapshot-0000010-0.100.pkl"
    (begun / "network-snapshot-0000010-0.100.safetensors").touch()
    assert newest_of_run(str(begun)) == begun / "network-snapshot-0000010-0.100.safetensors"


def test_folders_that_are_no_snapshots(run, tmp_path):
    fails_with(run_cli(snapshot_tool, "inspect", tmp_path), "a folder without config.json is no snapshot")
    source = run / "network-snapshot-0000003-0.100.safetensors"
    fails_with(run_cli(snapshot_tool, "export", source, run, "--license=mit"), "holds other files")
    folder = tmp_path / "model"
    assert run_cli(snapshot_tool, "export", source, folder, "--license=mit").exit_code == 0
    for text, message in [
        ("{", "not JSON"),
        ("[]", "config.json: its description is not that"),
        ('{"architecture": 1}', "format version"),
    ]:
        (folder / "config.json").write_text(text)
        fails_with(run_cli(snapshot_tool, "inspect", folder), message)
