"""Plain state dicts of any module, and what reconstruct_phema.py makes of them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import fails_with, run_cli

from reconstruct_phema import main as reconstruct
from training.phema import solve_posthoc_coefficients
from training.snapshot.reconstruction import list_averages, reconstruct_phema
from training.snapshot.state_dicts import StateDictFile

TIMES, WIDTHS = (100, 200, 300, 400), (0.05, 0.10)


def module(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """With a batch norm, weights that are shared, and an empty tensor."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    )
    net[3].weight = net[2].weight
    net.register_buffer("nothing", torch.zeros(0, 3))
    net.register_buffer("count", torch.tensor(seed))
    for tensor in (net[1].running_mean, net[1].running_var):
        tensor.uniform_(1, 2)
    return net.to(dtype)


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: x.clone().contiguous() for name, x in state.items()}, path)
    else:
        torch.save(state, path)


def load(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def write_averages(folder: Path, suffix: str, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """State dicts of 4 times and 2 widths; gives the values of each tensor, [files, ...]."""
    states = [module(k, dtype).state_dict() for k in range(len(TIMES) * len(WIDTHS))]
    names = [f"net-{kimg}-{std}{suffix}" for kimg in TIMES for std in WIDTHS]
    for name, state in zip(names, states, strict=True):
        save(state, folder / name)
    return {name: np.stack([state[name].double().numpy() for state in states]) for name in states[0]}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_sums_and_the_rest_is_the_latest(tmp_path, suffix, dtype):
    stacks = write_averages(tmp_path, suffix, dtype)
    result = run_cli(reconstruct, f"--indir={tmp_path}", f"--outdir={tmp_path / 'out'}", "--outstd=0.07,0.15")
    assert result.exit_code == 0, result.output
    kept = re.search(r"As in net-400-0.05\S+, not summed: (.*)", result.stdout)
    assert kept is not None and kept[1].endswith("and 2 more")
    coefs = solve_posthoc_coefficients(np.repeat(TIMES, 2), np.tile(WIDTHS, 4), 400, [0.07, 0.15])
    for column, std in zip(coefs.T, ("0.070", "0.150"), strict=True):
        made = load(tmp_path / "out" / f"phema-0000400-{std}{suffix}")
        net = module(dtype=dtype)
        net.load_state_dict(made)  # strict
        for name, stack in stacks.items():
            assert made[name].dtype == net.state_dict()[name].dtype
            latest = name.endswith(("running_mean", "running_var", "num_batches_tracked", "count"))
            wanted = stack[-2] if latest else np.tensordot(column, stack, 1)
            tolerance = 1e-5 if dtype == torch.float32 else 2**-7
            np.testing.assert_allclose(made[name].double().numpy(), wanted, rtol=tolerance, atol=tolerance)


def test_options_of_state_dicts(tmp_path):
    stacks = write_averages(tmp_path, ".pt")
    shutil.copy(tmp_path / "net-400-0.05.pt", tmp_path / "other-400-0.05.pt")
    args = [f"--indir={tmp_path}", f"--outdir={tmp_path / 'out'}", "--outstd=0.1"]
    fails_with(run_cli(reconstruct, *args), "are of the same time and width", "--inprefix")
    (tmp_path / "other-400-0.05.pt").rename(tmp_path / "other-400-0.07.pt")
    fails_with(run_cli(reconstruct, *args), "state dicts of several names, net, other: choose by --inprefix")
    args += ["--inprefix=net", "--latest=0.*", "--outkimg=300", "--format=safetensors", "--verify"]
    result = run_cli(reconstruct, *args)
    assert result.exit_code == 0 and "Width 0.050 from the others" in result.stdout, result.output
    file = tmp_path / "out" / "phema-0000300-0.100.safetensors"
    made = load(file)
    np.testing.assert_allclose(made["0.weight"], stacks["0.weight"][4], rtol=1e-6)  # the first of the time
    np.testing.assert_allclose(made["2.weight"], stacks["2.weight"][5], rtol=1e-5)
    np.testing.assert_allclose(made["1.running_mean"], stacks["1.running_mean"][5], rtol=1e-5)
    assert StateDictFile(file).reconstructed_from == [f"net-{k}-{std}.pt" for k in TIMES[:3] for std in WIDTHS]
    # A reconstruction may be made again, if the file says that it is one.
    assert run_cli(reconstruct, *args).exit_code == 0
    args[-2] = "--format=pt"
    assert run_cli(reconstruct, *args).exit_code == 0
    fails_with(
        run_cli(reconstruct, *args),
        "phema-0000300-0.100.pt exists, and does not say that it is a reconstruction",
        "--skip",
    )
    assert run_cli(reconstruct, *args, "--skip").exit_code == 0


def test_more_files_than_a_process_may_open_at_first(tmp_path):
    resource = pytest.importorskip("resource")
    for kimg in range(1, 101):
        torch.save({"weight": torch.full([3], float(kimg))}, tmp_path / f"net-{kimg}-0.05.pt")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = len(list(Path("/proc/self/fd").iterdir())) + 50 if Path("/proc/self/fd").exists() else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    try:
        (path,) = reconstruct_phema(list_averages(tmp_path), tmp_path / "out", "made", [0.05])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    torch.testing.assert_close(torch.load(path)["weight"], torch.full([3], 100.0))


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def test_bad_state_dicts(tmp_path, capsys):
    state, outdir = module().state_dict(), tmp_path / "out"
    path = tmp_path / "net-100-0.05.pt"
    args = [f"--indir={tmp_path}", f"--outdir={outdir}", "--outstd=0.1"]
    whole = [
        ({"model": state}, "'model' in it is no tensor: save net.state_dict() alone"),
        ({}, "holds no tensors by name"),
        ([1, 2], "holds no tensors by name"),
        (module(), "it asks for 'torch.nn.modules.container.Sequential'"),
        ({"x": Hostile()}, "it asks for '"),
        ({"x": torch.zeros(3, dtype=torch.float64)}, "x is of type float64"),
        ({"x": torch.zeros(3, dtype=torch.int64)}, "nothing in it is averaged"),
    ]
    for content, message in whole:
        torch.save(content, path)
        fails_with(run_cli(reconstruct, *args), f"{path}: ", message)
    torch.save(state, path)
    complete = path.read_bytes()
    for damaged in (b"", complete[:-200], b"nonsense" * 100):
        path.write_bytes(damaged)
        fails_with(run_cli(reconstruct, *args), f"{path}: no archive of torch.save")
    path.write_bytes(complete)
    for name, message in [("net-0-0.05.pt", "must be more than 0"), ("net-100-0.29.pt", "from 0.001 to 0.289")]:
        path = path.rename(tmp_path / name)
        fails_with(run_cli(reconstruct, *args), f"{path}: ", message)
    path = path.rename(tmp_path / "net-100-0.05.pt")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "net-50-0.05.pt")
    fails_with(run_cli(reconstruct, *args), "net-50-0.05.pt holds another network", "(extra is [1], there missing)")
    (tmp_path / "net-50-0.05.pt").unlink()
    fails_with(run_cli(reconstruct, *args, "--format=pkl"), "--format=pkl is for snapshots of networks")
    bad = {name: x.fill_(float("nan")) if name == "2.bias" else x for name, x in state.items()}
    torch.save(bad, path)
    fails_with(run_cli(reconstruct, *args), f"{path}: 2.bias holds NaN")
    assert not outdir.exists() or list(outdir.iterdir()) == []
    assert "run" not in capsys.readouterr().out


def test_state_dicts_beside_snapshots(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    torch.save(module().state_dict(), tmp_path / "run" / "net-100-0.05.pt")
    args = [f"--indir={tmp_path / 'run'}", f"--outdir={tmp_path / 'out'}", "--outstd=0.07"]
    fails_with(run_cli(reconstruct, *args), "net-100-0.05.pt is a plain state dict", "choose by --inprefix")
    assert run_cli(reconstruct, *args, "--inprefix=network-snapshot").exit_code == 0
