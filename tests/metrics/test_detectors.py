"""Feature extractors: golden values, independence of the batch, and files of weights as users have them."""

import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Golden, run_cli, write_dinov2
from servers import hub_file, serve

from dnnlib.errors import UserError
from snapshot_tool import main as snapshot_tool
from training.metrics.detectors import METRIC_FILES, load_detector


@pytest.fixture(scope="module", params=["inception", "dinov2 torch", "dinov2 pil", "pixels"])
def detector(request, inception_file, dinov2_folder):
    name, _, resize = request.param.partition(" ")
    weights = {"inception": inception_file, "dinov2": dinov2_folder, "pixels": None}[name]
    return load_detector(name, "cpu", weights, resize or "torch")


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (5, 13), (1, 3)])
def test_pixels(shape, check):
    # Each pixel as 8x8 equal ones can be divided into 8x8 equal cells.
    images = random_images(2, 3, *shape)
    enlarged = (images.double() / 255).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    cells = enlarged.reshape(2, 3, 8, shape[0], 8, shape[1]).mean(dim=(3, 5))
    check(load_detector("pixels", "cpu")(images), cells.flatten(1), 1e-6)


def test_interface(detector, check):
    images = random_images(3, 3, 40, 30)
    features = detector(images)
    assert features.shape == (3, detector.feature_dim) and features.dtype == torch.float32
    assert not features.requires_grad
    assert detector(images[:0]).shape == (0, detector.feature_dim)
    for i in range(3):
        check(detector(images[i : i + 1])[0], features[i], 1e-5)
    others = torch.cat([images[:1], random_images(2, 3, 40, 30, seed=1)])
    assert torch.equal(detector(others)[0], features[0])
    assert not torch.equal(detector(others)[1], features[1])


def test_grayscale_is_gray_rgb(detector):
    gray = random_images(2, 1, 16, 16)
    assert torch.equal(detector(gray), detector(gray.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("images", "fragment"),
    [
        (random_images(2, 4, 8, 8), r"uint8 \[2, 4, 8, 8\]"),
        (random_images(2, 3, 8, 8).float(), r"float32 \[2, 3, 8, 8\]"),
        (random_images(3, 8, 8), r"uint8 \[3, 8, 8\]"),
    ],
)
def test_other_images(detector, images, fragment):
    with pytest.raises(UserError, match=fragment):
        detector(images)


def test_description(detector, inception_file, dinov2_folder):
    facts = detector.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["detector"] == detector.name
    files = {"inception": inception_file, "dinov2": dinov2_folder / "model.safetensors"}
    path = files.get(detector.name)
    assert facts["weights"] == (None if path is None else hashlib.sha256(path.read_bytes()).hexdigest())


def test_resize_modes_are_told_apart(dinov2_folder):
    facts = [load_detector("dinov2", "cpu", dinov2_folder, resize).describe() for resize in ("torch", "pil")]
    assert facts[0] != facts[1]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (dict(name="vgg"), "unknown detector 'vgg': there are inception, dinov2, pixels"),
        (dict(name="dinov2", resize="clean"), "unknown resize mode 'clean': there are torch, pil"),
        (dict(name="inception", resize="pil"), "for the detector dinov2, not for inception"),
        (dict(name="pixels", weights="a.pth"), "a.pth: the detector pixels has no weights"),
        (dict(name="inception", weights="nowhere.pth"), "nowhere.pth: no such file"),
        (dict(name="dinov2", weights="nowhere"), "nowhere/config.json: no such file"),
    ],
)
def test_wrong_arguments(arguments, fragment):
    with pytest.raises(UserError, match=fragment):
        load_detector(device="cpu", **arguments)


# ---------------------------------------------------------------------------------------------------------
# Files of Inception


def test_older_format_of_torch(inception_state, inception_file, tmp_path):
    torch.save(inception_state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    images = random_images(1, 3, 32, 32)
    old, new = (load_detector("inception", "cpu", path) for path in (tmp_path / "old.pth", inception_file))
    assert torch.equal(old(images), new(images))


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


WRONG_STATES = {
    "missing": (lambda s: without(s, "Mixed_6a.branch3x3.conv.weight"), "without Mixed_6a.branch3x3.conv.weight"),
    "of another network": (lambda s: {"weight": torch.zeros(2)}, "without .* and 565 more"),
    "unexpected": (lambda s: {**s, "AuxLogits.fc.bias": torch.zeros(2)}, "with AuxLogits.fc.bias"),
    "shape": (lambda s: {**s, "fc.bias": torch.zeros(1000)}, r"fc.bias is \[1000\] instead of \[1008\]"),
    "infinite": (lambda s: {**s, "fc.bias": torch.full([1008], math.inf)}, "fc.bias holds NaN or infinity"),
    "code": (lambda s: {**s, "fc.bias": Code()}, "no weights saved by torch.save"),
    "numbers": (lambda s: {**s, "fc.bias": 1.0}, "other things than named tensors"),
    "list": (lambda s: list(s.values()), "other things than named tensors"),
}


@pytest.mark.parametrize("case", WRONG_STATES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_wrong_states(case, zipped, inception_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, fragment = WRONG_STATES[case]
    torch.save(change(inception_state), "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"w.pth: .*{fragment}") as err:
        load_detector("inception", "cpu", "w.pth")
    assert "\n" not in str(err.value) and len(str(err.value)) < 300
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"<html>", b"PK\x03\x04", b"\x80\x02}q\x00.", b"junk" * 25])
def test_no_states(data, tmp_path):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(UserError, match="w.pth: no weights saved by torch.save, or damaged: copy or fetch it again$"):
        load_detector("inception", "cpu", tmp_path / "w.pth")


@pytest.mark.parametrize("part", [0.5, 0.999])
def test_truncated_state(part, inception_file, tmp_path):
    data = inception_file.read_bytes()
    (tmp_path / "w.pth").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match="w.pth: no weights saved by torch.save"):
        load_detector("inception", "cpu", tmp_path / "w.pth")


def test_inception_is_fetched_once(server, inception_file, tmp_path, monkeypatch):
    data = inception_file.read_bytes()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    url = f"{server.url}/inception-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    monkeypatch.setitem(METRIC_FILES, "fid", [url])
    server.script[url.removeprefix(server.url)] = [serve(data)]

    monkeypatch.setenv("OPENEDM2_OFFLINE", "1")
    with pytest.raises(UserError, match=f"{url} is needed and no network is wanted.*snapshot prefetch fid") as err:
        load_detector("inception", "cpu")
    assert "\n" not in str(err.value)
    monkeypatch.setenv("OPENEDM2_OFFLINE", "0")
    assert run_cli(snapshot_tool, "prefetch", "fid").exit_code == 0
    monkeypatch.setenv("OPENEDM2_OFFLINE", "1")
    images = random_images(1, 3, 32, 32)
    assert torch.equal(
        load_detector("inception", "cpu")(images), load_detector("inception", "cpu", inception_file)(images)
    )
    assert len(server.requests) == 1


def test_name_tells_the_checksum(server, inception_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    name = METRIC_FILES["fid"][0].rsplit("/", 1)[1]
    monkeypatch.setitem(METRIC_FILES, "fid", [f"{server.url}/{name}"])
    server.script[f"/{name}"] = [serve(inception_file.read_bytes())]
    (tmp_path / name).symlink_to(inception_file)
    for weights in (None, tmp_path / name):
        with pytest.raises(UserError, match=r"its SHA-256 is [0-9a-f]{64}, not 6726825d\.\.\.: delete it"):
            load_detector("inception", "cpu", weights)


# ---------------------------------------------------------------------------------------------------------
# Files of DINOv2


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
    images = random_images(1, 3, 64, 64)
    features = half(images)
    assert features.dtype == torch.float32
    full = write_dinov2(tmp_path / "full", {name: tensor.float() for name, tensor in state.items()})
    check(features, load_detector("dinov2", "cpu", full)(images), 1e-6)


def test_other_settings_are_not_looked_at(dinov2_folder, tmp_path):
    extra = dict(
        auto_map={"AutoModel": "code.Model"},
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        attention_probs_dropout_prob=0.5,
    )
    images = random_images(1, 3, 64, 64)
    odd = load_detector("dinov2", "cpu", write_dinov2(tmp_path / "odd", **extra))
    assert torch.equal(odd(images), load_detector("dinov2", "cpu", dinov2_folder)(images))


def dinov2_state(**changes) -> dict[str, torch.Tensor]:
    return {**Golden("dinov2_tiny").state("state"), **changes}


WRONG_FOLDERS = {
    "another kind": (lambda f: write_dinov2(f, model_type="vit"), "config.json: .*model_type is not dinov2"),
    "fewer layers": (lambda f: write_dinov2(f, num_hidden_layers=2), "model.safetensors: .*with .*layer.2.* 17 more"),
    "more layers": (lambda f: write_dinov2(f, num_hidden_layers=4), "model.safetensors: .*without .* 17 more"),
    "shape": (lambda f: write_dinov2(f, hidden_size=96), "model.safetensors: .*has another shape"),
    "heads": (lambda f: write_dinov2(f, num_attention_heads=5), "(config.json: describes no DINOv2|has another shape)"),
    "patches of no size": (lambda f: write_dinov2(f, patch_size=0), "config.json: describes no DINOv2"),
    "patches of text": (lambda f: write_dinov2(f, patch_size="x"), "config.json: describes no DINOv2"),
    "infinite": (
        lambda f: write_dinov2(f, dinov2_state(**{"layernorm.bias": torch.full([48], math.nan)})),
        "model.safetensors: layernorm.bias holds NaN",
    ),
    "of another network": (lambda f: write_dinov2(f, {"x": torch.zeros(2)}), "model.safetensors: .*without"),
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
def test_config_that_is_none(text, tmp_path):
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
