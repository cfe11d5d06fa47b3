"""One file from a web server, however often the connection breaks."""

import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import requests
from urllib3 import BaseHTTPResponse, Retry
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError

from dnnlib.errors import RunError, UserError, one_line, printable_url
from dnnlib.progress import Progress

TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
BACK_OFF, MAX_BACK_OFF = 1.0, 60.0  # seconds: the first retry is immediate, the n-th waits BACK_OFF * 2^(n-1)
MAX_BYTES = 1 << 36  # of a file; those that networks and metrics need have up to a few GB
MAX_SECONDS = 24 * 3600  # of a transfer, over all attempts
SLOW = (1 << 10, 60)  # an attempt that brings fewer bytes per second, over so many seconds, ends
TRANSIENT = {408, 425, 429}  # statuses that may change, besides those of 500 and more


class Retries(Retry):
    """Attempts that are left, with the waiting time before each."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        """Seconds that the server asks to wait for, at most `MAX_BACK_OFF`; None if it does not say, or nonsense."""
        try:
            seconds = super().get_retry_after(response)
        except InvalidHeader:
            return None
        return None if seconds is None else min(seconds, MAX_BACK_OFF)


class InterruptedTransferError(Exception):
    """A transfer that ended before the file was complete, with the answer that said so, if one did."""

    def __init__(self, reason: str, answer: BaseHTTPResponse | None = None):
        super().__init__(reason)
        self.answer = answer


def fetch(url: str, partial: Path, version_file: Path, num_attempts: int, verbose: bool) -> None:
    """Complete the file `partial`, resuming where an earlier attempt, or an earlier process, stopped.

    Args:
        version_file: keeps which version of the file `partial` is the beginning of.
        num_attempts: how often to try without getting any further.
        verbose: show a progress bar on terminals.

    Raises:
        UserError: the address is wrong, or the file is too large.
        RunError: `num_attempts` attempts brought nothing more, or it takes too long. What came before is kept.
    """
    all_attempts = Retries(total=num_attempts - 1, backoff_factor=BACK_OFF, backoff_max=MAX_BACK_OFF)
    left, furthest, deadline = all_attempts, 0, time.monotonic() + MAX_SECONDS
    while True:
        try:
            return _fetch_rest(url, partial, version_file, deadline, verbose)
        except UserError:
            raise
        except (ValueError, requests.exceptions.TooManyRedirects) as err:  # of this address, or one redirected to
            raise UserError(f"{printable_url(url)}: {one_line(err)}: check the address") from None
        except (InterruptedTransferError, requests.RequestException, HTTPError) as err:
            failure = err
        size = _size(partial)
        if time.monotonic() > deadline:
            raise RunError(
                f"{printable_url(url)}: not fetched within {MAX_SECONDS / 3600:.1f} hours; {size} bytes are kept: "
                "repeat the command to continue"
            )
        try:
            got_further = size > furthest and size - furthest >= SLOW[0] * SLOW[1]
            left = (all_attempts if got_further else left).increment("GET", url, error=failure)
        except MaxRetryError:
            cause = getattr(failure.args[0], "reason", failure) if failure.args else failure  # without layers around it
            reason = one_line(cause)[:150] or type(failure).__name__
            raise RunError(
                f"{printable_url(url)}: not fetched after {num_attempts} attempts ({reason}); {size} bytes are kept"
            ) from None
        furthest = max(size, furthest)
        left.sleep(failure.answer if isinstance(failure, InterruptedTransferError) else None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch_rest(url: str, partial: Path, version_file: Path, deadline: float, verbose: bool) -> None:
    """Request what is missing of `partial`, which grows as far as the connection lasts, but not beyond the deadline."""
    # The version of the file that the server named, and its length. Without them, or with others, what is missing would
    # not fit what is there.
    version, total = _read_version(version_file)
    have = _size(partial) if version else 0
    headers = {"Accept-Encoding": "identity"}
    if have > 0:
        headers.update({"Range": f"bytes={have}-", "If-Range": version})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        answer, code = response.headers, response.status_code
        if code == 416 and have > 0 and answer.get("Content-Range") == f"bytes */{have}":
            return  # all of it was there
        if code == 416 or (code == 206 and not _continues(answer, have, version, total)):
            partial.unlink(missing_ok=True)
            raise InterruptedTransferError("the server does not resume where the download stopped")
        status = one_line(f"{code} {response.reason}")
        if code in TRANSIENT or code >= 500:
            raise InterruptedTransferError(status, response.raw)
        if code not in (200, 206):
            raise UserError(f"{printable_url(url)}: the server says {status}: check the address")
        if code == 200:
            have, total = 0, _begin(url, answer, partial, version_file)
        limit = _limit(url, partial, have, total)
        size = _receive(response, partial, have, total, limit, deadline, verbose)
    if size > limit:
        partial.unlink()
        raise UserError(f"{printable_url(url)}: more than {limit / 1e9:.0f} GB, and no end of it: check the address")
    if size == 0 or (total is not None and size != total):
        raise InterruptedTransferError(f"the connection ended after {size} of {total or 'unknown'} bytes")


def _begin(url: str, answer: Mapping[str, str], partial: Path, version_file: Path) -> int | None:
    """Note the version that a transfer from the start will bring; its length, if the server says it."""
    if answer.get("Content-Type", "").startswith("text/html") and not partial.stem.endswith((".html", ".htm")):
        raise UserError(f"{printable_url(url)}: the server sends a web page instead of the file: check the address")
    length = answer.get("Content-Length", "")
    known = re.fullmatch(r"[0-9]{1,18}", length)
    encoding = answer.get("Content-Encoding", "identity")
    if encoding != "identity":  # unpacked, it could be of any size
        print(
            f"Note: {printable_url(url)} comes packed ({one_line(encoding)}) and is kept as it comes", file=sys.stderr
        )
    partial.unlink(missing_ok=True)
    version_file.write_text(f"{int(length)} {_version(answer)}" if known else "")
    return int(length) if known else None


def _limit(url: str, partial: Path, have: int, total: int | None) -> int:
    """The size at which a transfer is given up.

    Raises:
        UserError: the file is known to be larger than that.
    """
    limit = min(MAX_BYTES, have + shutil.disk_usage(partial.parent).free)
    if total is not None and total > limit:
        raise UserError(
            f"{printable_url(url)}: has {total / 1e9:.1f} GB, and there is room for {limit / 1e9:.1f} GB in "
            f"{partial.parent}: make room, or check the address"
        )
    return limit


def _receive(
    response: requests.Response,
    partial: Path,
    have: int,
    total: int | None,
    limit: int,
    deadline: float,
    verbose: bool,
) -> int:
    """Append the body of an answer to `partial`, as it is sent, until it is larger than `limit`; its size then."""
    with (
        open(partial, "ab") as f,
        Progress(
            desc=partial.stem.split("_", 2)[2],
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            hidden=not verbose,
        ) as progress,
    ):
        floor, seconds = SLOW
        checked, size = time.monotonic(), have
        while f.tell() <= limit and (data := response.raw.read1(1 << 16, decode_content=False)):
            f.write(data)
            progress.update(len(data))
            now = time.monotonic()
            if now > deadline:
                raise InterruptedTransferError("it takes too long")
            if now - checked >= seconds:
                if f.tell() - size < floor * (now - checked):
                    raise InterruptedTransferError(f"less than {floor} bytes per second")
                checked, size = now, f.tell()
        return f.tell()


def _version(answer: Mapping[str, str]) -> str:
    """What identifies the version of a file, in a form that If-Range takes; '' if the server does not say."""
    etag = answer.get("ETag", "")
    return etag if etag.startswith('"') else answer.get("Last-Modified", "")


def _read_version(version_file: Path) -> tuple[str, int | None]:
    """Version and length of the file in transfer, '' and None where they are not known."""
    try:
        match = re.fullmatch(r"([0-9]+) ([ -~]+)", version_file.read_text())
    except (OSError, UnicodeError):
        match = None
    return (match[2], int(match[1])) if match else ("", None)


def _continues(answer: Mapping[str, str], have: int, version: str, total: int | None) -> bool:
    """Whether a partial answer is the rest, or a piece of it, of the version whose first `have` bytes are there."""
    return (
        have > 0
        and _version(answer) in ("", version)
        and re.fullmatch(rf"bytes {have}-[0-9]+/{total}", answer.get("Content-Range", "")) is not None
    )
