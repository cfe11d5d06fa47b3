"""Processes that are started in odd ways, and processes that are lost."""

import os
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch.distributed as dist
from conftest import DIGITS, ROOT, TINY, torchrun

from torch_utils import distributed
from torch_utils.roll_call import RollCall

SCRIPT = """
import os, sys
from torch_utils import distributed
from dnnlib.errors import RunError, UserError
try:
    distributed.init()
except UserError as err:
    sys.exit(f"UserError: {err}")
print("world", distributed.get_world_size(), flush=True)
print("here", distributed.get_local_world_size(), flush=True)
if distributed.get_world_size() > 1:
    distributed.barrier()
    if distributed.get_rank() == int(os.environ.get("LOST", 1)):
        os._exit(9)
    try:
        distributed.barrier()
        distributed.all_reduce_sum_(__import__("torch").ones(1))
    except RunError as err:
        print(f"RunError: {err}", flush=True)
        os._exit(1)
"""


def start(**variables: str) -> subprocess.Popen:
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
    env = {name: value for name, value in others.items() if name not in known} | variables
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
    assert output == "world 1\nhere 1\n", errors


@pytest.mark.parametrize(
    ("variables", "fragment"),
    [
        (
            {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK=x and WORLD_SIZE=2 are no",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK=2 and WORLD_SIZE=2 are no",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set, but not MASTER_ADDR: start with torchrun"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but not MASTER_PORT"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started several processes, but SLURM_PROCID is not set"),
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
    name = (
        f"RunError: process 1 of 2 ({socket.gethostname()}, process id {processes[1].pid}) ended or no longer answers"
    )
    assert name in output, (output, errors)
    assert processes[0].returncode == 1 and "Traceback" not in errors


def test_processes_of_srun_find_each_other():
    """And name the first one, too, where that is lost, with all that they share."""
    common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.[1-2],other", "LOST": "0"}
    common |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x12),2,1"}
    processes = [start(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **common) for rank in range(2)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert all(output.startswith("world 2\nhere 2\n") for output, _ in outputs), outputs
    name = (
        f"RunError: process 0 of 2 ({socket.gethostname()}, process id {processes[0].pid}) ended or no longer answers"
    )
    assert name in outputs[1][0], outputs


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[03-06,9],a", "gpu03"),
        ("n[1,3]x[02-03]-y,b", "n1x02-y"),
        ("10.0.0.[7-9]", "10.0.0.7"),
    ],
)
def test_the_first_of_the_hosts_of_a_job(hosts, first):
    assert distributed.first_host(hosts) == first


def test_a_process_that_hangs_is_named():
    store, lost = dist.HashStore(), []
    first, second = (RollCall(store, rank, 2, lost.append, beat=0.01) for rank in range(2))
    time.sleep(0.3)
    assert lost == []
    second.stop()  # without a word, as one that hangs or whose machine is gone
    first._thread.join(10)
    name = f"process 1 of 2 ({socket.gethostname()}, process id {os.getpid()})"
    assert lost == [f"{name} has given no sign of life for 0 seconds"]
    assert first.missing() == [1] and first.names([1]) == name


def test_a_process_that_does_not_come_is_named():
    """Its thread still gives signs of life."""
    store, lost = dist.HashStore(), []
    first, second = (RollCall(store, rank, 2, lost.append, beat=0.01, late=0.2) for rank in range(2))
    for _ in range(3):
        first.arrive(), second.arrive()
        time.sleep(0.02)
    first.arrive()
    first._thread.join(10)
    name = f"process 1 of 2 ({socket.gethostname()}, process id {os.getpid()})"
    assert lost == [f"{name} did not come within 0 seconds to where the others wait"]
    second.stop()


class StoreThatHangs(dist.HashStore):
    """As one in a process that was stopped, or on a machine that is gone."""

    hangs = False

    def check(self, keys: list[str]) -> bool:
        while self.hangs:
            time.sleep(0.01)
        return super().check(keys)


def test_the_first_process_is_named_where_the_store_hangs():
    """Which it holds, or the torchrun of its machine."""
    store, lost = StoreThatHangs(), []
    roll_call = RollCall(store, 0, 2, lost.append, beat=0.01)
    store.hangs = True
    roll_call._guard.join(10)
    store.hangs = False
    roll_call.stop()
    assert lost == [
        f"process 0 of 2 ({socket.gethostname()}, process id {os.getpid()}) has given no sign of life for 0 seconds"
    ]


def test_slow_steps_are_not_late():
    """Nor is anybody while all have come and one has other work to do."""
    store, lost = dist.HashStore(), []
    first, second = (RollCall(store, rank, 2, lost.append, beat=0.01, late=0.05) for rank in range(2))
    for _ in range(3):
        first.arrive(), second.arrive()
        time.sleep(0.2)
    first.arrive()
    time.sleep(0.2)
    second.arrive()
    time.sleep(1)
    first.stop(), second.stop()
    assert lost == []


def test_a_process_that_leaves_is_not_lost():
    store, lost = dist.HashStore(), []
    first, second = (RollCall(store, rank, 2, lost.append, beat=0.01) for rank in range(2))
    second.leave()
    time.sleep(0.3)
    first.stop()
    assert lost == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_ends_with_the_process_that_is_killed(rank, tmp_path):
    """Its name comes first; nobody says that a state is saved; and the job continues when it is repeated."""
    script = ["train_edm2.py", f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--checkpoint=2Ki"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*command, "--duration=100Mi"], cwd=ROOT, **pipes)
    while not list(tmp_path.glob("training-state-*.pt")):
        time.sleep(0.1)
    workers = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    workers[str(rank)].kill()
    start = time.monotonic()
    output, errors = process.communicate(timeout=100)
    assert time.monotonic() - start < 60 and process.returncode == 1
    name = f"Error: process {rank} of 2 ({socket.gethostname()}, process id {workers[str(rank)].pid})"
    ours = [line for line in errors.splitlines() if line.startswith("Error")]
    assert len(ours) == 1 and ours[0].startswith(name), errors
    assert errors.count("Traceback") == 1 and "ChildFailedError" in errors  # torchrun's own
    assert "Suspended" not in output
    nimg = max(int(path.stem[-7:]) for path in tmp_path.glob("training-state-*.pt"))
    done = subprocess.run([*command, f"--duration={nimg + 1}Ki"], cwd=ROOT, **pipes, timeout=200)
    assert "Resuming at" in done.stdout and done.returncode == 0, done.stderr


def test_the_same_processes_form_groups_one_after_the_other(tmp_path):
    """A slow process must not meet the addresses of a group that is gone: it waited for them forever."""
    script = tmp_path / "groups.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from torch_utils import distributed
for group in range(4):
    if int(os.environ["RANK"]) == group % 2:
        time.sleep(0.5)
    distributed.init(timeout_minutes=0.5)
    distributed.barrier()
    distributed.shutdown()
print("done")
""")
    result = torchrun(2, script, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done") == 2


@pytest.mark.slow
def test_torchrun_starts_a_job_again(tmp_path):
    """`--max-restarts`: it continues from the last training state when a process has died, and ends as it should."""
    script = ["train_edm2.py", f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--duration=24Ki"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = subprocess.Popen([*command, *script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("training-state-*.pt")):
        time.sleep(0.1)
    workers = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    workers["1"].kill()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert re.search(r"Resuming at \d+ images", output) and f"Done: {24 << 10} images" in output
