"""Processes and their ranks; the only module that reads them. In a single process, every function is trivial."""

import ctypes
import datetime
import itertools
import os
import re
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dnnlib.errors import RunError, UserError
from torch_utils.roll_call import RollCall

TIMEOUT_MINUTES = 60

# In messages of gloo and NCCL about processes that are gone.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out",
    "timeout",
    "remote process",
)


def init(timeout_minutes: float | None = None) -> None:
    """Join the process group where torchrun, or srun, started this process; otherwise, or if called again, do nothing.

    Args:
        timeout_minutes: how long processes wait for each other; None = `TIMEOUT_MINUTES`.

    Raises:
        UserError: the environment names a rank, and not who else is there.
    """
    global _patient
    if dist.is_initialized():
        return
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) == 1:
            return
        _take_ranks_of_srun()
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing and world_size != "1":
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size} are set, but not {missing[0]}: start with torchrun")
    if missing:
        return
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size} are no rank and number of processes: use torchrun")
    timeout = datetime.timedelta(minutes=timeout_minutes or TIMEOUT_MINUTES)
    # CPU tensors go through gloo, so that small flags are exchanged without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = f"group {next(_groups)}"
    with naming_lost_processes():
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(group, store)
        dist.init_process_group(backend, store=store, rank=int(rank), world_size=int(world_size), timeout=timeout)
        if get_world_size() > 1:
            _patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
            _begin_roll_call(group)


def _take_ranks_of_srun() -> None:
    """Set the variables that torchrun sets from those of a process that srun started.

    Where all find each other is the first machine, at a port made of the numbers of job and step; MASTER_ADDR and
    MASTER_PORT, where they are set, say otherwise.

    Raises:
        UserError: one of Slurm's variables is missing.
    """
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    needed = [*names.values(), "SLURM_STEP_NODELIST", "SLURM_JOB_ID"]
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(f"srun started several processes, but {missing[0]} is not set: start them with torchrun")
    os.environ.update({name: os.environ[theirs] for name, theirs in names.items()})
    tasks = re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 8(x3),4
    os.environ.setdefault("LOCAL_WORLD_SIZE", max(tasks, key=int, default="1"))
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    job, step = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    os.environ.setdefault("MASTER_PORT", str(15000 + (job * 16 + step) % 15000))  # below those that systems hand out


def first_host(hosts: str) -> str:
    """The first of a list of hosts as Slurm writes it: 'gpu[03-06,9],login' -> 'gpu03'."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0]) if found else hosts


# torchrun's store outlives a group: one that is formed by the same processes later must not meet the addresses in it.
_groups = itertools.count()
_roll_call: RollCall | None = None
_patient: Any = None  # connections without a timeout worth the name


def _begin_roll_call(group: str) -> None:
    """Have each process of a group watched by another."""
    global _roll_call
    # A connection of its own: others are busy while NCCL's processes find each other.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _roll_call = RollCall(dist.PrefixStore(f"roll call {attempt} {group}", store), get_rank(), get_world_size())


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Where the block fails because another process is gone, the first of those that are left says so in one line.

    Raises:
        RunError: another process ended, or no longer answers.
        SystemExit: likewise; the others exit quietly.
    """
    try:
        yield
    except RuntimeError as err:  # gloo's and NCCL's errors have no narrower type in all versions of torch
        if isinstance(err, RunError) or not any(word in str(err) for word in LOST):
            raise
        who = _missing_processes()
        raise RunError(
            f"{who} ended or no longer answers (its own message, if any, says why); nothing more was saved: repeat the "
            "command to continue from the last training state"
        ) from None


def _missing_processes() -> str:
    """What those are called that do not answer; ends this process if another one will tell.

    Raises:
        SystemExit: this is not the first of those that answer.
    """
    if _roll_call is not None:
        with suppress(RuntimeError):  # the store is gone, too
            missing = _roll_call.missing()
            if missing and get_rank() > min(set(range(get_world_size())).difference(missing)):
                raise SystemExit(1)
            if missing:
                return _roll_call.names(missing)
        if not os.environ.get("TORCHELASTIC_RUN_ID"):  # without torchrun, it is the first process's store
            return _roll_call.first
    return "another process of this job"


def shutdown() -> None:
    """Leave the process group, all processes together."""
    global _roll_call
    if dist.is_initialized():
        if _roll_call is not None:
            _roll_call.leave()
            _roll_call = None
        _exchange(0, dist.ReduceOp.MAX)
        for work in _recent:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(work))  # outlives Python, too
        dist.destroy_process_group()


# gloo's threads may let go of an exchange some time after it is done. Where theirs is the last reference, they free its
# tensor, for which they need Python's lock: destroy_process_group, which holds it, would wait for them for ever, and
# while Python shuts down they would end the process. So the latest exchanges are held here.
_recent: deque[Any] = deque(maxlen=16)


def _exchange(value: int, op: Any, group: Any = None) -> int:
    """The reduction of a number over all processes by a `dist.ReduceOp`; `group` = other connections of these."""
    if get_world_size() == 1:
        return value
    message = torch.tensor([value])  # on the CPU: no GPU needs to be chosen yet
    with naming_lost_processes():
        work = dist.all_reduce(message, op=op, group=group, async_op=True)
        assert work is not None
        work.wait()
    _recent.append(work)
    return int(message.item())


def get_rank() -> int:
    """Index of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_local_rank() -> int:
    """Index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def get_local_world_size() -> int:
    """Number of processes on this machine; of srun, on the machine with most of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def print0(message: str) -> None:
    """Print a line once, from the first process."""
    if get_rank() == 0:
        print(message, flush=True)


def barrier() -> None:
    """Wait until all processes are here."""
    _exchange(0, dist.ReduceOp.MAX)


def wait_for_first() -> None:
    """Wait for the first process, which alone has worked before this call, as long as it takes.

    Exchanges, which have a timeout, come after it.
    """
    _exchange(0, dist.ReduceOp.MAX, _patient)


@contextmanager
def fail_together() -> Iterator[None]:
    """Where the block fails on any process, the first that failed raises its error and all others exit quietly.

    The block must not communicate.
    """
    error = None
    try:
        yield
    except Exception as err:
        error = err
    failed = _exchange(get_rank() if error is not None else get_world_size(), dist.ReduceOp.MIN)
    if error is not None and failed == get_rank():
        raise error
    if failed < get_world_size():
        raise SystemExit(1)


def all_reduce_sum_(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The sum of a tensor over all processes, or those of a group, which replaces it."""
    if get_world_size() > 1:
        with naming_lost_processes():
            dist.all_reduce(tensor, group=group)
    return tensor


def sum_gradients_(gradients: torch.Tensor) -> None:
    """The sum over all processes, which replaces a tensor that each of them has once in each step of training.

    One that does not come within `roll_call.LATE` seconds of the others, or three of its longest steps, ends the job.
    """
    if _roll_call is not None:
        _roll_call.arrive()
    all_reduce_sum_(gradients)


def broadcast_(tensors: Iterable[torch.Tensor]) -> None:
    """Copy rank 0's values to all processes, in place."""
    if get_world_size() > 1:
        with naming_lost_processes():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)


def from_first(value: Any) -> Any:
    """The value that the first process passed, on all of them."""
    values = [value]
    if get_world_size() > 1:
        with naming_lost_processes():
            dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_to_first(value: Any) -> list[Any]:
    """Values of all processes, in order of rank, on the first; nothing on the others. Tensors may differ in size."""
    if get_world_size() == 1:
        return [value]
    parts = [None] * get_world_size() if get_rank() == 0 else None
    with naming_lost_processes():
        dist.gather_object(value, parts)
    return [] if parts is None else [part for part in parts if part is not None]


def check_same(tensors: Sequence[torch.Tensor], what: str, places: int = 1) -> None:
    """Check that all processes hold the same numbers, by a digest of their bits.

    Args:
        what: the tensors are, for the message.
        places: in groups of so many processes, each holds other numbers, and those at one place of all groups the same.

    Raises:
        RunError: one does not. On the first process, the others exit quietly.
    """
    if get_world_size() == places or not tensors:
        return
    digests = [torch.zeros(1, dtype=torch.int64) for _ in range(get_world_size())]
    with naming_lost_processes():
        dist.all_gather(digests, _digest(tensors).cpu())
    values = [int(digest) for digest in digests]
    different = []
    for place in range(places):
        ranks = range(place, len(values), places)
        found = [values[rank] for rank in ranks]
        usual = max(found, key=found.count)  # the first process's where none is the most frequent
        different += [rank for rank in ranks if values[rank] != usual]
    if not different:
        return
    if get_rank() > 0:
        raise SystemExit(1)
    assert _roll_call is not None
    raise RunError(
        f"{_roll_call.names(different)}: holds other {what} than the rest, as faults of memory or network cause it; "
        "nothing more was saved: check that machine, and repeat the command to continue from the last training state"
    )


def _digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A number that nearly any change of float32 tensors changes, int64 [1], on their device."""
    sums = torch.stack([x.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for x in tensors])
    factors = 2 * torch.arange(len(sums), device=sums.device) + 1  # so that tensors cannot change places
    return (sums * factors).sum().reshape(1)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any process; the answer is the same on all."""
    return bool(_exchange(int(flag), dist.ReduceOp.MAX))


def smallest(value: int) -> int:
    """The smallest of the values that all processes pass, on all of them."""
    return _exchange(value, dist.ReduceOp.MIN)


class SuspendSignals:
    """Inside, SIGTERM, SIGUSR1 (clusters) and the first Ctrl-C ask to stop instead of killing the process.

    A second Ctrl-C interrupts at once. One inside another has received what the outer one has.

    Args:
        message: what is said then.
        signals: those that ask to stop.
    """

    def __init__(
        self,
        message: str = "trying to save the state first. Ctrl-C again stops at once, unsaved.",
        signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT),
    ):
        self.received, self._message, self._signals = False, message, signals

    def __enter__(self) -> "SuspendSignals":
        self._previous = {}
        for sig in self._signals:
            self._previous[sig] = signal.signal(sig, self._handle)
        outer = getattr(self._previous[signal.SIGTERM], "__self__", None)
        if isinstance(outer, SuspendSignals):
            self.received |= outer.received
        return self

    def __exit__(self, *exc_info) -> None:
        for sig, handler in self._previous.items():
            signal.signal(sig, handler)

    def _handle(self, sig: int, _frame) -> None:
        if not self.received and get_rank() == 0:
            os.write(2, f"\nAsked to stop: {self._message}\n".encode())
        self.received = True
        if sig == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
