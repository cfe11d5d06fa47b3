"""Training commands in processes that are forked off one that has imported everything: each start takes no second.

As a script, it is that process: it reads jobs from its input, a line of JSON each, and answers each with a line.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATIENCE = 90.0  # seconds


class Forks:
    """Runs jobs; a context. All arithmetic is done by one thread.

    Args:
        log: file that takes what the processes print.
    """

    def __init__(self, log: Path):
        self.log = log

    def __enter__(self) -> "Forks":
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._log = open(self.log, "a")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def run(self, processes: int, commands: Sequence[tuple[str, Sequence[str]]], **more: Any) -> list[int]:
        """Exit codes of the processes of a job, by rank; -9 = killed.

        Args:
            commands: pairs of a module, which has a `main`, and its options, one after the other.
            more: `kill` = (rank, seconds after the start); `patience` = seconds after the end of a process in which the
                others have to end; and what `faults.install` knows.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"processes": processes, "commands": [(name, list(options)) for name, options in commands], **more}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _be_process(rank: int, job: dict[str, Any], variables: dict[str, str]) -> int:
    """Run the commands of a job; the exit code."""
    import importlib

    import click
    import faults

    os.environ.update({**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if variables else {})
    faults.install(rank, job)
    try:
        for module, options in job["commands"]:
            importlib.import_module(module).main(options, standalone_mode=False)
    except click.ClickException as err:
        err.show()
        return err.exit_code
    except SystemExit as err:
        return int(err.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    return 0


def _run(job: dict[str, Any]) -> list[int]:
    """Fork the processes of a job, and wait for all of them."""
    count = job["processes"]
    variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)  # the output of this process is for answers
            code = _be_process(rank, job, variables if count > 1 else {})
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    kill_rank, kill_after = job.get("kill") or (0, float("inf"))
    begin, last_end = time.monotonic(), float("inf")
    while len(codes) < count:
        time.sleep(0.002)
        if time.monotonic() - begin > kill_after:
            if pids[kill_rank] not in codes:
                os.kill(pids[kill_rank], 9)
            kill_after = float("inf")
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                last_end = min(last_end, time.monotonic())
        if time.monotonic() - last_end > job.get("patience", PATIENCE):  # they hang
            for pid in set(pids) - codes.keys():
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
                codes[pid] = 99
                os.waitpid(pid, 0)
    return [codes[pid] for pid in pids]


def _serve() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    torch.set_num_threads(1)
    import torch._dynamo  # which optimisers import
    import torch.utils.tensorboard

    import train_classifier
    import train_edm2
    import train_nvae
    import train_score_sde
    import train_uvit
    import training.training_loop  # noqa: F401 - for the processes

    modules = (train_classifier, train_edm2, train_nvae, train_score_sde, train_uvit)
    assert all(module.main for module in modules)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
