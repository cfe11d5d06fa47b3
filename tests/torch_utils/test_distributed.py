"""Processes that are started in odd ways, and processes that are lost."""

import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
import os, sys
from torch_utils import distributed
from dnnlib.errors import RunError, UserError
try:
    distributed.init()
except UserError as err:
    sys.exit(f"UserError: {err}")
print("world", distributed.get_world_size(), flush=True)
if distributed.get_world_size() > 1:
    distributed.barrier()
    if distributed.get_rank() == 1:
        os._exit(9)
    try:
        distributed.barrier()
        distributed.all_reduce_sum_(__import__("torch").ones(1))
    except RunError as err:
        print(f"RunError: {err}", flush=True)
        os._exit(1)
"""


def start(**variables: str) -> subprocess.Popen:
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")
    env = {name: value for name, value in os.environ.items() if name not in known} | variables
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_one_process(variables):
    output, errors = start(**variables).communicate(timeout=100)
    assert output == "world 1\n", errors


@pytest.mark.parametrize(
    ("variables", "fragment"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set, but not MASTER_ADDR: start with torchrun"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but not MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started several processes, which would all do the same"),
    ],
)
def test_half_an_environment_is_one_line(variables, fragment):
    output, errors = start(**variables).communicate(timeout=100)
    assert errors.startswith("UserError: ") and fragment in errors and errors.count("\n") == 1 and output == ""


def test_a_lost_process_is_one_line():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(RANK=str(rank), **common) for rank in range(2)]
    (output, errors), _ = (process.communicate(timeout=100) for process in processes)
    assert "RunError: another process of this job ended or no longer answers" in output, (output, errors)
    assert processes[0].returncode == 1 and "Traceback" not in errors
