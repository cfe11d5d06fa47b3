"""Devices and what they compute in."""

import functools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath

import psutil
import torch

from dnnlib.errors import UserError, one_line
from torch_utils import distributed
from torch_utils.cpu_memory import keep_freed_memory

NO_LIMIT = 1 << 62  # bytes
TOLERATED = 1.05  # times as long, which may be an error of measurement


def select_device(name: str) -> torch.device:
    """The device named 'cpu', 'cuda' or 'mps', or for 'auto' the first of CUDA, MPS and CPU that is available.

    Under torchrun each process gets its own GPU.

    Raises:
        UserError: the device is not available.
    """
    alone = distributed.get_world_size() == 1  # processes cannot exchange tensors on MPS
    available = {"cuda": torch.cuda.is_available(), "mps": alone and torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, ok in available.items() if ok)
        raise UserError(f"--device={name} is not available on this machine (available: {there}): choose one of those")
    if name != "cuda":
        return torch.device(name)
    # Where each process is shown one GPU only, as srun can do it, that is the first.
    return torch.device("cuda", distributed.get_local_rank() if torch.cuda.device_count() > 1 else 0)


def set_up_device(device: torch.device, huge_pages: bool = False) -> None:
    """Make a GPU the current one, with float32 arithmetic that is float32; on a CPU, `keep_freed_memory`."""
    if device.type == "cpu":
        keep_freed_memory(huge_pages)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def eagerly(compiled: bool) -> Iterator[None]:
    """Inside, what torch.compile has compiled runs as it is written, so that hooks of its modules are called.

    Args:
        compiled: whether anything has been; otherwise, nothing is different.
    """
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def free_memory(device: torch.device) -> int:
    """Bytes of a device's memory that this process may fill; on a CPU, its share of what the machine has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(psutil.virtual_memory().available, left_by_control_groups()) // distributed.get_local_world_size()


def left_by_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that a container or cluster job leaves, as Linux says (control groups, version 2); `NO_LIMIT` = any number.

    Args:
        root: holds what is known of the group at the top, and folders of those in it.
        own: names the group of this process.
    """
    try:
        named = re.search(r"^0::(/.*)$", own.read_text(), re.MULTILINE)
    except OSError:  # another system
        return NO_LIMIT
    groups = PurePosixPath(named[1]).parts[1:] if named else ()
    return min(_left_in(root.joinpath(*groups[:n])) for n in range(len(groups) + 1))


def _left_in(group: Path) -> int:
    """Bytes between what a group uses and its limit. What Linux keeps of files, and drops when needed, is free."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # not there, or 'max'
        return NO_LIMIT
    return limit - used + (int(files[1]) if files else 0)


def check_compiler(device: torch.device) -> None:
    """Check that `torch.compile` works on a device, by a small function.

    Raises:
        UserError: `torch.compile` does not work here.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as err:  # whatever a compiler can fail with
        reason = one_line(err)[:100]
        raise UserError(f"--compile=1: torch.compile does not work here ({reason}): leave it out") from None


def resolve_precision(precision: str, device: torch.device) -> str:
    """'fp32', 'bf16' or 'fp16' for a device: 'auto' is fp16 on GPUs and fp32 on CPUs, which have no fast fp16.

    A processor that is slower in bfloat16 is pointed out.
    """
    if precision == "auto":
        return "fp32" if device.type == "cpu" else "fp16"
    if precision == "fp16" and device.type == "cpu":
        distributed.print0("Note: a CPU has no fast fp16 arithmetic; using fp32.")
        return "fp32"
    if precision == "bf16" and device.type == "cpu":
        slowdown = slowdown_of_bf16()
        if slowdown is not None:
            distributed.print0(
                f"Note: on this processor, a convolution in bf16 takes {slowdown:.1f} times as long as in fp32: "
                f"leave --precision out"
            )
    return precision


def slowdown_of_bf16() -> float | None:
    """How many times as long a convolution takes in bfloat16 as in float32 on this processor; None if not longer."""
    slowdown = 1 / speed_of_bf16()
    return slowdown if slowdown > TOLERATED else None


@functools.cache
def speed_of_bf16() -> float:
    """How many times as fast a convolution is in bfloat16 as in float32 on this processor, measured once.

    With AMX it is several times as fast; where a processor has no instructions for it, several times as slow.
    """

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(1, 128, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = torch.ones(128, 128, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.conv2d(x, w, padding=1)
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.inference_mode():
        return seconds(torch.float32) / seconds(torch.bfloat16)
