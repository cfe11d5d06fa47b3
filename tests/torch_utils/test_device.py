"""What devices compute in."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import AVX2_ALONE, ROOT

from torch_utils import device
from torch_utils.device import NO_LIMIT, left_by_control_groups, resolve_precision, speed_of_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speed", "noted"), [(4.0, False), (1.0, False), (0.2, True)])
def test_a_precision_that_loses_is_noted(monkeypatch, capsys, speed, noted):
    monkeypatch.setattr(device, "speed_of_bf16", lambda: speed)
    assert resolve_precision("bf16", CPU) == "bf16"
    assert ("takes 5.0 times as long as in fp32" in capsys.readouterr().out) == noted
    assert resolve_precision("auto", CPU) == "fp32"
    assert capsys.readouterr().out == ""


def test_speed_is_measured_once():
    assert 0.01 < speed_of_bf16() < 100
    assert speed_of_bf16() == speed_of_bf16()


PROGRAM = """
import torch
from conftest import relative_error, tiny_network
from torch_utils.device import resolve_precision
from training.networks.edm2_cpu import FastDenoiser
cpu = torch.device("cpu")
print(torch.backends.cpu.get_cpu_capability())
print(resolve_precision("auto", cpu))
print(resolve_precision("bf16", cpu))
net = tiny_network(img_resolution=32, model_channels=128)  # wide enough for Winograd
x = torch.randn(2, net.img_channels, 32, 32, generator=torch.Generator().manual_seed(0))
print(relative_error(FastDenoiser(net, 2)(x, torch.ones(2)), net(x, torch.ones(2))) < 1e-5)
"""


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not a processor that can do as if"
)
def test_a_processor_with_avx2_alone():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **AVX2_ALONE, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    capability, auto, note, bf16, equal = result.stdout.splitlines()
    assert (capability, auto, bf16, equal) == ("AVX2", "fp32", "bf16", "True")
    assert note.startswith("Note: on this processor, a convolution in bf16 takes")


def test_memory_that_control_groups_leave(tmp_path):
    """The smallest of what the groups that a process is in leave; files that Linux keeps in memory do not count."""
    own, root = tmp_path / "cgroup", tmp_path / "root"
    limits = {"": ("max", 900, 0), "job_7": ("1000", 800, 100), "job_7/step": ("max", 700, 0)}
    for name, (limit, used, files) in limits.items():
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 6\n")
    assert left_by_control_groups(root, own) == NO_LIMIT  # another system
    for group, left in {"/": NO_LIMIT, "/job_7": 300, "/job_7/step": 300, "/other": NO_LIMIT}.items():
        own.write_text(f"4:memory:/x\n0::{group}\n")
        assert left_by_control_groups(root, own) == left, group
    own.write_text("4:memory:/x\n")  # version 1 alone
    assert left_by_control_groups(root, own) == NO_LIMIT
