"""Which processes of a job still answer: found out by beats in the store that all of them share."""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from dnnlib.errors import tell_torchrun

BEAT = 4.0  # seconds between signs of life
SILENT_BEATS = 10  # after which a process that gives none is lost
LATE = 45.0  # seconds between processes at the sum of gradients after which one is lost
NO_SIGN = "has given no sign of life for {:.0f} seconds"
ANSWER = 3.0  # seconds that all have to answer a roll call


class Store(Protocol):
    """What processes of a job share: bytes by key. All methods raise RuntimeError where the store is gone."""

    def set(self, key: str, value: str) -> Any: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


def end_process(message: str) -> NoReturn:
    """End the process at once, whatever its other threads wait for."""
    print(f"Error: {message}", file=sys.stderr, flush=True)
    tell_torchrun(f"Error: {message}")
    os._exit(1)


class RollCall:
    """Signs of life of this process, and a watch over those of the next one. Each process of a job makes one.

    A process whose connection breaks is noticed by those who talk to it. This is for the others: those that hang, and
    those whose machine is gone. A process may also hang while its thread still gives signs, waiting for a disk, say: it
    is noticed because it does not come to where all others are, see `arrive`.

    Args:
        store: shared by all processes, and used by nothing else.
        rank, world_size: of this process.
        on_lost: called with a message when the next process gives no sign of life any more.
        beat: seconds between signs.
        late: seconds that processes may be apart where they `arrive`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        on_lost: Callable[[str], object] = end_process,
        beat: float = BEAT,
        late: float = LATE,
    ):
        self._store, self.rank, self.world_size = store, rank, world_size
        self._on_lost, self._beat, self._late = on_lost, beat, late
        self._arrivals, self._waited, self._longest = 0, 0.0, 0.0
        self._beats = 0
        self._stopped = threading.Event()
        store.set(f"name/{rank}", f"{socket.gethostname()}, process id {os.getpid()}")
        store.set(f"arrivals/{rank}", "0")
        store.get("name/0")  # which is waited for
        self.first = self.names([0])  # can be said when the store is gone
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._guard = threading.Thread(target=self._watch_store, daemon=True)
        self._guard.start()
        atexit.register(self.stop)  # a thread in torch's code while Python shuts down could end the process

    def stop(self) -> None:
        """Give no more signs, and watch no more."""
        self._stopped.set()
        for thread in (self._thread, self._guard):
            if threading.current_thread() is not thread:
                thread.join(2 * self._beat)

    def arrive(self) -> None:
        """Say that this process has come to a point that all come to, again and again, at about the same time."""
        if self._arrivals > 1:  # the first times take longer, as kernels are chosen and compiled
            self._longest = max(self._longest, self._waited)
        self._waited = 0.0
        self._arrivals += 1

    def _late_ones(self) -> list[int]:
        """Processes that have not come, for long, to where this one has, if it is the first that notices it."""
        arrivals = self._arrivals
        if arrivals < 2 or self._waited < max(self._late, 3 * self._longest):
            return []
        late = [rank for rank in range(self.world_size) if int(self._store.get(f"arrivals/{rank}")) < arrivals]
        return late if self.rank == min(set(range(self.world_size)).difference(late)) else []

    def missing(self) -> list[int]:
        """Processes that do not say that they are there; to be called by all that notice that something is wrong."""
        self._store.set(f"here/{self.rank}", "")
        silent = set(range(self.world_size))
        deadline = time.monotonic() + ANSWER
        while silent and time.monotonic() < deadline:
            silent -= {rank for rank in silent if self._store.check([f"here/{rank}"])}
            time.sleep(0.1)
        return sorted(silent | {rank for rank in range(self.world_size) if self._store.check([f"lost/{rank}"])})

    def names(self, ranks: Sequence[int]) -> str:
        """What these processes are called: 'process 1 of 2 (host, process id 123)'."""
        names = [self._store.get(f"name/{r}").decode() if self._store.check([f"name/{r}"]) else "" for r in ranks]
        numbers = ", ".join(map(str, ranks))
        return f"process{'es' * (len(ranks) > 1)} {numbers} of {self.world_size} ({'; '.join(filter(None, names))})"

    def _watch(self) -> None:
        """Beat, and listen to the next process; ends with the store, or when that process is lost."""
        other = (self.rank + 1) % self.world_size
        last, silent = b"", 0
        # Own beats are counted, not seconds: a job that is suspended as a whole is not lost.
        while not self._stopped.wait(self._beat):
            try:
                self._beats += 1
                self._waited += self._beat
                self._store.set(f"arrivals/{self.rank}", str(self._arrivals))
                self._store.set(f"beat/{self.rank}", str(self._beats))
                if late := self._late_ones():
                    self._lose(late, f"did not come within {self._late:.0f} seconds to where the others wait")
                    return
                heard = self._store.get(f"beat/{other}") if self._store.check([f"beat/{other}"]) else b""
                silent = silent + 1 if heard == last else 0
                last = heard
                if silent < SILENT_BEATS or self._store.check([f"left/{other}"]):
                    continue
                self._lose([other], NO_SIGN.format(SILENT_BEATS * self._beat))
            except RuntimeError:  # the store is gone
                pass
            return

    def _watch_store(self) -> None:
        """End with the thread that watches; should it wait for the store, then that is on a machine that hangs."""
        last, silent = -1, 0
        while self._thread.is_alive() and not self._stopped.wait(self._beat):
            silent = silent + 1 if self._beats == last else 0
            last = self._beats
            if silent >= SILENT_BEATS:
                self._on_lost(f"{self.first} {NO_SIGN.format(SILENT_BEATS * self._beat)}")
                return

    def _lose(self, ranks: Sequence[int], why: str) -> None:
        """Give up processes, for a reason that their names are the beginning of."""
        for rank in ranks:
            self._store.set(f"lost/{rank}", "")
        self._store.set(f"here/{self.rank}", "")
        self._on_lost(f"{self.names(ranks)} {why}")

    def leave(self) -> None:
        """Say that this process ends as it should, and stop."""
        with contextlib.suppress(RuntimeError):  # the store has left before
            self._store.set(f"left/{self.rank}", "")
        self.stop()
