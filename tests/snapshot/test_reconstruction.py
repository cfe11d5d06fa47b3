"""Post-hoc reconstruction on files: what is computed does not depend on how they are stored and read."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from dnnlib.errors import UserError
from training.encoders import StandardRGBEncoder
from training.networks.edm2 import Precond
from training.phema import solve_posthoc_coefficients
from training.snapshot import load_network, open_snapshot, save_network, sums
from training.snapshot.reconstruction import list_averages, reconstruct_phema

TIMES = [1000 * (i + 1) for i in range(20)]
WIDTHS = [0.05, 0.10]
OUTPUTS = [0.03, 0.08, 0.15]


def name_of(nimg: int, std: float) -> str:
    return f"network-snapshot-{nimg // 1000:07d}-{std:.3f}.safetensors"


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """More snapshots than a group has, of type float32."""
    folder = tmp_path_factory.mktemp("snapshots")
    for nimg in TIMES:
        for std in WIDTHS:
            torch.manual_seed(nimg + round(1000 * std))
            net = Precond(8, 3, 2, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])
            metadata = {"nimg": nimg, "ema_std": std}
            save_network(folder / name_of(nimg, std), net, StandardRGBEncoder(), metadata, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def expected(snapshots):
    """The weighted sums in float64, per output and name of a parameter."""
    averages = [(nimg, std) for nimg in TIMES for std in WIDTHS]
    coefs = solve_posthoc_coefficients(*zip(*averages, strict=True), TIMES[-1], OUTPUTS)
    files = [open_snapshot(snapshots / name_of(*average)) for average in averages]
    names = [name for name, _ in load_network(files[0].path).net.named_parameters()]
    stacks = {name: np.stack([file.get_tensor(name).double().numpy() for file in files]) for name in names}
    return [{name: np.tensordot(column, stack, 1) for name, stack in stacks.items()} for column in coefs.T]


def check(indir, tmp_path, expected, rtol):
    paths = reconstruct_phema(list_averages(indir, "network-snapshot"), tmp_path / "out", "phema", OUTPUTS)
    for path, wanted in zip(paths, expected, strict=True):
        file = open_snapshot(path)
        for name, values in wanted.items():
            error = np.linalg.norm(file.get_tensor(name).double().numpy() - values) / max(np.linalg.norm(values), 1e-30)
            assert error < rtol, name


@pytest.mark.parametrize(
    ("memory", "slice_size"),
    [
        (sums.MEMORY, sums.SLICE),
        (1000 * (2 * sums.GROUP + 12 * len(OUTPUTS)), 100),  # parts begin and end within tensors
        (1, 1 << 10),  # at least a slice
    ],
)
def test_sizes_of_parts(snapshots, expected, tmp_path, monkeypatch, memory, slice_size):
    monkeypatch.setattr(sums, "MEMORY", memory)
    monkeypatch.setattr(sums, "SLICE", slice_size)
    check(snapshots, tmp_path, expected, 1e-5)


def copies(snapshots, folder, rewrite):
    """Snapshots with tensors and types as `rewrite(index, name, tensor)` gives them, and in the library's order."""
    folder.mkdir()
    for i, path in enumerate(sorted(snapshots.iterdir())):
        with safetensors.safe_open(path, framework="pt") as f:
            tensors = {name: rewrite(i, name, f.get_tensor(name)) for name in f.keys()}
            safetensors.torch.save_file(tensors, folder / path.name, f.metadata())
    return folder


def test_tensors_in_another_order(snapshots, expected, tmp_path):
    indir = copies(snapshots, tmp_path / "in", lambda i, name, tensor: tensor)
    first = open_snapshot(min(indir.iterdir()))
    names = list(expected[0])
    assert not all(first.is_followed(a, b) for a, b in zip(names, names[1:], strict=False))
    check(indir, tmp_path, expected, 1e-5)


def test_results_have_the_precision_of_the_newest_snapshot(snapshots, expected, tmp_path):
    """Values that float16 holds, in files of both types: a result in float32 is not rounded to float16."""
    wide = (0, len(TIMES) * len(WIDTHS) - 2)  # the first, and the newest of its width
    indir = copies(
        snapshots, tmp_path / "in", lambda i, name, tensor: tensor.half().float() if i in wide else tensor.half()
    )
    rounded = copies(snapshots, tmp_path / "rounded", lambda i, name, tensor: tensor.half().float())
    paths = [
        reconstruct_phema(list_averages(folder, "network-snapshot"), tmp_path / f"of-{folder.name}", "phema", [0.08])[0]
        for folder in (indir, rounded)
    ]
    mixed, same = (open_snapshot(path) for path in paths)
    for name in expected[0]:
        assert mixed.dtype(name) == torch.float32
        torch.testing.assert_close(mixed.get_tensor(name), same.get_tensor(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["first", "last"])
def test_tensor_that_is_not_finite_is_named(snapshots, tmp_path, where):
    names = [name for name, _ in load_network(next(snapshots.iterdir())).net.named_parameters()]
    bad = names[0 if where == "first" else -1]

    def rewrite(i, name, tensor):
        return torch.full_like(tensor, float("nan")) if (i, name) == (3, bad) else tensor

    indir = copies(snapshots, tmp_path / "in", rewrite)
    with pytest.raises(UserError, match=f"{sorted(p.name for p in indir.iterdir())[3]}: {bad} holds NaN"):
        reconstruct_phema(list_averages(indir, "network-snapshot"), tmp_path / "out", "phema", [0.08])
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_damaged_tensor_is_named(snapshots, tmp_path, where):
    """A flipped bit of one input, in whichever of the parts that are read together."""
    indir = tmp_path / "in"
    shutil.copytree(snapshots, indir)
    path = sorted(indir.iterdir())[5]
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    parameters = {name for name, _ in load_network(path).net.named_parameters()}
    places = {key: value["data_offsets"] for key, value in json.loads(data[8:begin]).items() if key in parameters}
    first, last = min(start for start, _ in places.values()), max(stop for _, stop in places.values()) - 1
    data[begin + first + int(where * (last - first))] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name}: \S+ is damaged \(checksum mismatch\)"):
        reconstruct_phema(list_averages(indir, "network-snapshot"), tmp_path / "out", "phema", [0.08])
    assert not any((tmp_path / "out").iterdir())
