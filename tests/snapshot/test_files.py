"""Snapshots of all layouts through the same functions."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import GOLDEN
from torch import nn

from dnnlib.errors import UserError
from training.config.edm2 import TRAINING_PRESETS
from training.config.fields import Config, option
from training.encoders import StandardRGBEncoder
from training.families import ARCHITECTURES, Architecture, preset_network
from training.snapshot import build_for, files, load_network, open_snapshot, save_network, write_snapshot
from training.snapshot.layout import Reader, Request, Writer
from training.snapshot.native import NativeFile, write_native

PUBLISHED = GOLDEN / "official" / "network-snapshot-0008388-0.050.pkl"


def test_missing_or_of_another_kind(tmp_path, snapshot_file):
    with pytest.raises(UserError, match="no such file"):
        load_network(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match="typo: no such file"):
        load_network(tmp_path / "typo")
    other = tmp_path / "net.bin"
    other.write_bytes(b"x")
    with pytest.raises(UserError, match="snapshots are .safetensors or .pkl or .pth or .pt files"):
        load_network(other)
    with pytest.raises(UserError, match="holds no network 'net'"):
        load_network(snapshot_file, which="net")

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a snapshot of this project"):
        load_network(tmp_path / "other.safetensors")


# ---------------------------------------------------------------------------------------------------------
# Presets


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_preset_of_the_network(suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    net = preset_network(TRAINING_PRESETS["digits"])
    save_network(path, net, StandardRGBEncoder(), {})
    assert load_network(path, preset="digits").metadata == load_network(path).metadata
    with pytest.raises(UserError, match="holds another network than that of preset 'edm2-img64-xs'"):
        load_network(path, preset="edm2-img64-xs")
    with pytest.raises(UserError, match="unknown preset 'digit'; the nearest are digits"):
        load_network(path, preset="digit")


def test_preset_of_another_network():
    with pytest.raises(UserError, match=f"{PUBLISHED.name}: holds another network"):
        load_network(PUBLISHED, preset="digits")


# ---------------------------------------------------------------------------------------------------------
# The tables


@dataclass(frozen=True, kw_only=True)
class Width(Config):
    width: int = option(low=1, high=100)


class Other(nn.Module):
    """A network of another family, with buffers of several types."""

    def __init__(self, width: int):
        super().__init__()
        self.init_kwargs = {"width": width}
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("sigmas", torch.linspace(1, 0, width, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor((1 << 40) + 1))


@pytest.fixture
def other(monkeypatch) -> Other:
    entry = Architecture(
        "other", "nobody", Other, Width, make=lambda arguments, _data: Other(**arguments), makes_images=False
    )
    monkeypatch.setitem(ARCHITECTURES, "other.Other", entry)
    return Other(5)


def test_networks_of_unknown_classes(tmp_path):
    for suffix in (".safetensors", ".pkl"):
        with pytest.raises(UserError, match=r"a Linear is no network of this project"):
            save_network(tmp_path / f"net{suffix}", nn.Linear(2, 2), StandardRGBEncoder(), {})
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_is_an_entry(other, tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, other, StandardRGBEncoder(), {})
    file, loaded = open_snapshot(path), load_network(path).net
    assert [file.dtype(name) for name in ("weight", "sigmas", "steps")] == [torch.float16, torch.float64, torch.int64]
    assert isinstance(loaded, Other) and loaded.weight.dtype == torch.float32
    for name, buffer in other.named_buffers():
        assert loaded.get_buffer(name).dtype == buffer.dtype and torch.equal(loaded.get_buffer(name), buffer)
    tensors = {**safetensors.torch.load_file(path), "steps": torch.tensor(1.0)}
    with safetensors.safe_open(path, framework="pt") as f:
        safetensors.torch.save_file(tensors, path, f.metadata())
    with pytest.raises(UserError, match="steps is not of type int64"):
        load_network(path)


def test_layouts_hold_what_they_can(other, tmp_path):
    with pytest.raises(UserError, match=r"net.pkl: .pkl files cannot hold a network of other.Other: keep it as"):
        save_network(tmp_path / "net.pkl", other, StandardRGBEncoder(), {})
    assert list(tmp_path.iterdir()) == []


def test_a_layout_is_an_entry(tmp_path, monkeypatch, snapshot_file):
    """Two layouts that share a suffix: what is in a file decides."""

    def begins_with(start: bytes):
        return lambda request: request.fetch().read_bytes().startswith(start)

    def open_after(count: int):
        def read(request: Request) -> NativeFile:
            request.check_which(request.fetch(), ["ema", "net"])
            (tmp_path / "rest").write_bytes(request.fetch().read_bytes()[count:])
            assert request.preset == "digits"
            return NativeFile(tmp_path / "rest")

        return read

    def write_after(start: bytes):
        def write(path: Path, *args) -> None:
            write_native(tmp_path / "rest", *args)
            path.write_bytes(start + (tmp_path / "rest").read_bytes())

        return write

    readers = [Reader(".pth", open_after(1), begins_with(b"1")), Reader(".pth", open_after(2), begins_with(b"22"))]
    writers = [
        Writer(".pth", write_after(b"1"), ["toy.ToyModel"]),
        Writer(".pth", write_after(b"22"), ["edm2.Precond"]),
    ]
    monkeypatch.setattr(files, "READERS", [*readers, *files.READERS])
    monkeypatch.setattr(files, "WRITERS", [*writers, *files.WRITERS])
    path = tmp_path / "net.pth"
    source = open_snapshot(snapshot_file)
    write_snapshot(path, build_for(source)[0], source.get_tensor, torch.float16, source.description)
    assert path.read_bytes().startswith(b"22")
    for which in ("ema", "net"):
        opened = open_snapshot(path, which, preset="digits")
        assert opened.metadata == source.metadata
        assert all(torch.equal(opened.get_tensor(name), source.get_tensor(name)) for name in source.names)
    with pytest.raises(UserError, match="holds no network 'raw', only 'ema', 'net'"):
        open_snapshot(path, "raw", preset="digits")
    path.write_bytes(b"3")
    with pytest.raises(UserError, match="net.pth: .*nothing in the file was run"):  # the last reader takes all others
        open_snapshot(path)
    with pytest.raises(UserError, match="snapshots are .pth or .safetensors or .pkl or .pt files"):
        open_snapshot("https://example.com/net.onnx")  # and nothing is fetched
