"""Small helpers around tensors: devices, gradients, pictures."""

import ctypes
import functools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from dnnlib.util import UserError, atomic_write, one_line
from torch_utils import distributed

HUGE_PAGE = 2 << 20
MIN_TILE = 64  # smaller images are enlarged to this many pixels in grids, to be seen at all
GRID_GAP, GRID_GRAY = 8, 96  # width and brightness of the lines between enlarged images


def select_device(name: str) -> torch.device:
    """The device called 'cpu', 'cuda' or 'mps', or for 'auto' the first of CUDA, MPS and CPU that is there.

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
        raise UserError(f"--device={name} is not available on this machine (available: {there})")
    return torch.device("cuda", distributed.get_local_rank()) if name == "cuda" else torch.device(name)


def set_up_device(device: torch.device, huge_pages: bool = False) -> None:
    """Make a GPU the current one, with float32 arithmetic that is float32; on a CPU, `keep_freed_memory`."""
    if device.type == "cpu":
        keep_freed_memory(huge_pages)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def check_compiler(device: torch.device) -> None:
    """
    Raises:
        UserError: `torch.compile` does not work here.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as err:  # whatever a compiler can fail with
        reason = one_line(err)[:100]
        raise UserError(f"--compile=1: torch.compile does not work here ({reason}): leave it out") from None


@functools.cache
def keep_freed_memory(huge_pages: bool = False) -> None:
    """Let the C library reuse large blocks instead of returning them to the system at once.

    Otherwise each new activation costs a page fault per 4 KiB. Only glibc has these settings; elsewhere, nothing
    happens.

    Args:
        huge_pages: also ask for pages of 2 MiB, so that processors remember where weights are. For long jobs: the
            system may take a second to find them.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # see man 3 mallopt
    large_blocks = mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most of old ones
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_TOP_PAD, 64 << 20)
    if huge_pages and large_blocks and _addresses_are_free():
        _use_huge_pages(libc)


def _addresses_are_free() -> bool:
    """Whether a process may have addresses without using memory."""
    import resource  # not on all systems

    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    policy = Path("/proc/sys/vm/overcommit_memory")
    return set(limits) == {resource.RLIM_INFINITY} and policy.is_file() and policy.read_text().strip() != "2"


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Ask for huge pages in the next 8 GB that the heap grows into. Some systems give them only to who asks."""
    MADV_HUGEPAGE = 14  # see man 2 madvise
    malloc, free, madvise = libc.malloc, libc.free, libc.madvise
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = 2**31 - HUGE_PAGE
    blocks = [block for block in (malloc(size) for _ in range(4)) if block]
    for block in blocks:
        start = -(-block // HUGE_PAGE) * HUGE_PAGE
        madvise(start, size - HUGE_PAGE, MADV_HUGEPAGE)
    for block in blocks:
        free(block)  # the heap keeps the addresses, since it gives nothing back


def resolve_precision(precision: str, device: torch.device) -> str:
    """'fp32', 'bf16' or 'fp16' for a device: 'auto' is fp16 on GPUs and fp32 on CPUs, which have no fast fp16."""
    if precision == "auto":
        return "fp32" if device.type == "cpu" else "fp16"
    if precision == "fp16" and device.type == "cpu":
        distributed.print0("Note: a CPU has no fast fp16 arithmetic; using fp32.")
        return "fp32"
    return precision


def flat_gradients(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Give all parameters gradients that are views of one vector, so that one operation reaches them all."""
    params = [p for p in parameters if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.as_strided(p.shape, p.stride())  # in the memory format of the parameter
    return flat


def use_channels_last(net: torch.nn.Module) -> None:
    """Store the weights of convolutions as their activations are stored, so that none has to be converted."""
    for p in net.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def channels_last_views(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Parameters and their gradients with the channels last, and so contiguous after `use_channels_last`.

    Of other tensors, fused Adam makes copies.
    """
    views = []
    for p in parameters:
        if p.grad is not None:
            order = (0, 2, 3, 1) if p.ndim == 4 else tuple(range(p.ndim))
            view = p.detach().permute(order)
            view.grad = p.grad.permute(order)
            views.append(view)
    return views


def replace_nonfinite_(values: torch.Tensor) -> torch.Tensor:
    """Set NaN and infinities to 0, in place; returns their number, int64 [], without waiting for a GPU."""
    if values.device.type == "cpu" and values.sum().isfinite():  # a sum is a quarter of the work, and spoiled by any
        return torch.zeros([], dtype=torch.int64)
    count = (~values.isfinite()).sum()
    torch.nan_to_num(values, nan=0, posinf=0, neginf=0, out=values)
    return count


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [C, H, W] (1, 2, 3 or 4 channels) as PNG."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    with atomic_write(path, sync=False) as f:
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(f, format="png")


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange uint8 [N, C, H, W] in rows: [C, height, width]. Small images are enlarged and set apart."""
    N, C, H, W = images.shape
    rows = math.ceil(N / columns)
    scale = max(math.ceil(MIN_TILE / H), 1)
    gap = GRID_GAP if scale > 1 else 0
    tiles = np.zeros([rows * columns, C, H, W], dtype=np.uint8)
    tiles[:N] = images
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
    tiles = np.pad(tiles, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=GRID_GRAY)
    tiles = tiles.reshape(rows, columns, C, *tiles.shape[2:]).transpose(2, 0, 3, 1, 4)
    grid = tiles.reshape(C, rows * (H * scale + gap), columns * (W * scale + gap))
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def drawable(images: torch.Tensor) -> np.ndarray:
    """uint8 [N, 1 or 3 or 4, H, W] for pictures: pixels as they are, latents scaled, extra channels dropped."""
    if images.dtype != torch.uint8:
        low, high = images.amin(), images.amax()
        images = ((images - low) / (high - low).clamp(min=1e-8) * 255).to(torch.uint8)
    channels = images.shape[1]
    return images[:, : {1: 1, 2: 1, 4: 4}.get(channels, 3)].cpu().numpy()
