"""Settings of the C library for large blocks of memory on CPUs."""

import ctypes
import functools
from pathlib import Path

HUGE_PAGE = 2 << 20


@functools.cache
def keep_freed_memory(huge_pages: bool = False) -> None:
    """Let the C library reuse large blocks instead of returning them to the system at once.

    Otherwise each new activation costs a page fault per 4 KiB. Only glibc has these settings; elsewhere, nothing
    happens.

    Args:
        huge_pages: also ask for pages of 2 MiB, of which a CPU's address cache (TLB) covers more memory. For long jobs:
            the system may take a second to find them.
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
    """Whether a process may reserve addresses without using memory."""
    import resource  # not on all systems

    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    policy = Path("/proc/sys/vm/overcommit_memory")
    return set(limits) == {resource.RLIM_INFINITY} and policy.is_file() and policy.read_text().strip() != "2"


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Ask for huge pages in the next 8 GB that the heap grows into: some systems give them only on request."""
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
