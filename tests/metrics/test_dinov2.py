"""DINOv2: its settings, folders of weights as users have them, and the hub."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Golden, write_dinov2
from measuring import uint8_images
from servers import hub_file

from dnnlib.errors import UserError
from training.metrics.detectors import load_detector


def test_resize_modes_are_distinguished(dinov2_folder):
    facts = [load_detector("dinov2", "cpu", dinov2_folder, resize).describe() for resize in ("torch", "pil")]
    assert facts[0] != facts[1]


def test_dinov2_loads_quietly(dinov2_folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_detector("dinov2", "cpu", dinov2_folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_dinov2_of_half_precision(dinov2_folder, tmp_path, check):
    state = {name: tensor.half() for name, tensor in Golden("dinov2_tiny").state("state").items()}
    half = load_detector(
        "dinov2", "cpu", write_dinov2(tmp_path / "half", state, dtype="float16", torch_dtype="float16")
    )
    images = uint8_images(1, 3, 64, 64)
    features = half(images)
    assert features.dtype == torch.float32
    full = write_dinov2(tmp_path / "full", {name: tensor.float() for name, tensor in state.items()})
    check(features, load_detector("dinov2", "cpu", full)(images), 1e-6)


def test_other_settings_are_ignored(dinov2_folder, tmp_path):
    extra = dict(
        auto_map={"AutoModel": "code.Model"},
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        attention_probs_dropout_prob=0.5,
    )
    images = uint8_images(1, 3, 64, 64)
    odd = load_detector("dinov2", "cpu", write_dinov2(tmp_path / "odd", **extra))
    assert torch.equal(odd(images), load_detector("dinov2", "cpu", dinov2_folder)(images))


def config() -> dict:
    return Golden("dinov2_tiny").meta["dinov2_config"]


def infinite_state() -> dict[str, torch.Tensor]:
    state = Golden("dinov2_tiny").state("state")
    return {**state, "layernorm.bias": torch.full_like(state["layernorm.bias"], math.nan)}


WRONG_FOLDERS = {
    "another kind": (lambda f: write_dinov2(f, model_type="vit"), "config.json: .*model_type is not dinov2"),
    "fewer layers": (
        lambda f: write_dinov2(f, num_hidden_layers=config()["num_hidden_layers"] - 1),
        "model.safetensors: .*unexpected .*layer.* 17 more",
    ),
    "more layers": (
        lambda f: write_dinov2(f, num_hidden_layers=config()["num_hidden_layers"] + 1),
        "model.safetensors: .*missing .* 17 more",
    ),
    "shape": (
        lambda f: write_dinov2(f, hidden_size=2 * config()["hidden_size"]),
        "model.safetensors: .*has another shape",
    ),
    "heads": (
        lambda f: write_dinov2(f, num_attention_heads=config()["hidden_size"] - 1),
        "(config.json: does not describe a DINOv2|has another shape)",
    ),
    "patches of no size": (lambda f: write_dinov2(f, patch_size=0), "config.json: does not describe a DINOv2"),
    "patches of text": (lambda f: write_dinov2(f, patch_size="x"), "config.json: does not describe a DINOv2"),
    "infinite": (
        lambda f: write_dinov2(f, infinite_state()),
        "model.safetensors: layernorm.bias holds NaN",
    ),
    "of another network": (lambda f: write_dinov2(f, {"x": torch.zeros(2)}), "model.safetensors: .*missing"),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_wrong_folders(case, tmp_path, capfd):
    write, fragment = WRONG_FOLDERS[case]
    write(tmp_path)
    with pytest.raises(UserError, match=fragment) as err:
        load_detector("dinov2", "cpu", tmp_path)
    assert "\n" not in str(err.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "[]", "{", '"dinov2"', "[" * 100_000])
def test_not_a_config(text, tmp_path):
    write_dinov2(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: not the config.json of a DINOv2"):
        load_detector("dinov2", "cpu", tmp_path)


def test_damaged_tensors(tmp_path):
    path = write_dinov2(tmp_path) / "model.safetensors"
    for data in (path.read_bytes()[:-100], b"", b"\0" * 100):
        path.write_bytes(data)
        with pytest.raises(UserError, match="model.safetensors: damaged or truncated"):
            load_detector("dinov2", "cpu", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        load_detector("dinov2", "cpu", tmp_path)


def test_without_transformers(dinov2_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers: pip install transformers"):
        load_detector("dinov2", "cpu", dinov2_folder)


ON_THE_HUB = """
import os, sys, torch
from dnnlib.errors import UserError
from training.metrics.detectors import load_detector

images = torch.arange(3 * 32 * 32).remainder(251).reshape(1, 3, 32, 32).byte()
expected = load_detector("dinov2", "cpu", sys.argv[1])(images)
os.environ["OPENEDM2_OFFLINE"] = "1"
try:
    load_detector("dinov2", "cpu")
except UserError as err:
    print(err)
os.environ["OPENEDM2_OFFLINE"] = "0"
assert torch.equal(load_detector("dinov2", "cpu")(images), expected)
os.environ["OPENEDM2_OFFLINE"] = "1"
assert torch.equal(load_detector("dinov2", "cpu")(images), expected)
"""


def test_dinov2_from_the_hub(server, tmp_path, dinov2_folder):
    for name in ("config.json", "model.safetensors"):
        data = (dinov2_folder / name).read_bytes()
        server.script[f"/facebook/dinov2-large/resolve/main/{name}"] = [hub_file(data)]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "OPENEDM2_"))}
    env.update(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "hub"))
    command = [sys.executable, "-c", ON_THE_HUB, str(dinov2_folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "dinov2-large/config.json is needed and no network is wanted" in done.stdout
    assert "python snapshot_tool.py prefetch fd_dinov2" in done.stdout
    assert set(server.script) <= {path for path, _ in server.requests}
