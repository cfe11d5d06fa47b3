"""Files at URLs, fetched once and kept."""

import hashlib
import os
import re
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnnlib.errors import RunError, UserError, one_line
from dnnlib.files import file_sha256

CACHE_VARIABLE = "DNNLIB_CACHE_DIR"  # where downloads are kept, ~/.cache/dnnlib by default
OFFLINE_VARIABLE = "OPENEDM2_OFFLINE"  # 1 = use nothing but what is kept
TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes
BACK_OFF, MAX_BACK_OFF = 1.0, 60.0  # seconds before the second attempt, doubled for each further one
KNOWN_SHA256: dict[str, str] = {}  # by URL; none has been published yet for the files used here


def open_url(
    url: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    num_attempts: int = 5,
    verbose: bool = True,
    return_filename: bool = False,
) -> Any:
    """Open a file, or a URL (http, https, file, hf://owner/repo/file) of which a copy is kept.

    Interrupted downloads are continued. Of several processes that want a file, one fetches it.

    Args:
        url: may end in `#sha256=...`, which the contents must match.
        cache_dir: where copies are kept; default: $DNNLIB_CACHE_DIR/downloads.
        num_attempts: how often to try without getting any further.
        verbose: show a progress bar on terminals.
        return_filename: return the path of the file instead of an open one.

    Raises:
        UserError: no such file, or it is not to be had: a wrong address or checksum, or no network wanted.
        RunError: it could not be fetched now.
    """
    path = _local_path(os.fspath(url), cache_dir, num_attempts, verbose)
    return str(path) if return_filename else open(path, "rb")


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def offline() -> bool:
    """Whether the user wants no network to be used."""
    return os.environ.get(OFFLINE_VARIABLE, "0") not in ("", "0")


def _local_path(url: str, cache_dir: str | os.PathLike | None, num_attempts: int, verbose: bool) -> Path:
    if not is_url(url):
        if not os.path.isfile(url):
            raise UserError(f"{url}: {'a folder, not a file' if os.path.isdir(url) else 'no such file'}")
        return Path(url)
    address, checksum = _split_checksum(url)
    scheme = address.partition(":")[0].lower()
    if scheme == "file":
        return _verified(_file_path(address), url, checksum)
    if scheme == "hf":
        return _verified(_hub_file(address), url, checksum)
    try:
        parts = urllib.parse.urlsplit(address)
        # The published tools name their copies in the same way, up to what follows the hash of the address.
        key = hashlib.md5(address.encode(), usedforsecurity=False).hexdigest()
    except ValueError:
        parts = None
    if parts is None or scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{_shown(url)}: not an address of the form http(s)://, file:/// or hf://owner/repo/file")

    checksum = checksum or KNOWN_SHA256.get(address, "")
    try:
        home = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/dnnlib").expanduser()
    except RuntimeError as err:
        raise UserError(f"{CACHE_VARIABLE}={os.environ.get(CACHE_VARIABLE)}: {err}") from None
    folder = Path(cache_dir) if cache_dir is not None else home / "downloads"
    target = folder / f"{key}_{re.sub(r'[^0-9a-zA-Z._-]', '_', parts.path.rsplit('/', 1)[-1])[-128:]}"
    kept = [path for path in sorted(folder.glob(f"{key}_*")) if path.is_file()]
    if kept:
        return _verified(kept[0], url, checksum)
    if offline():
        raise UserError(
            f"{_shown(address)} is needed and no network is wanted ({OFFLINE_VARIABLE}=1): save it as {target}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if not target.is_file():  # else another process has fetched it meanwhile
                _download(address, target, checksum, num_attempts, verbose)
    except OSError as err:
        raise UserError(f"{folder}: cannot keep downloads here ({err.strerror or err}): set {CACHE_VARIABLE}") from None
    return _verified(target, url, checksum)


def _split_checksum(url: str) -> tuple[str, str]:
    """The address and the sum of 'address#sha256=sum', '' if there is none."""
    match = re.fullmatch(r"(.*)#sha256=(.*)", url, re.IGNORECASE | re.DOTALL)
    if match is None:
        return url, ""
    if not re.fullmatch(r"[0-9a-f]{64}", match[2], re.IGNORECASE):
        raise UserError(f"{_shown(url)}: a SHA-256 sum has 64 hexadecimal digits")
    return match[1], match[2].lower()


def _shown(url: str) -> str:
    """An address as it may be printed: on one line, and without a password."""
    return re.sub(r"//[^/@]*@", "//", one_line(url))


def _file_path(address: str) -> Path:
    rest = re.sub(r"^file://(localhost(?=/))?", "", address, flags=re.IGNORECASE)
    if not rest.startswith("/"):
        raise UserError(f"{_shown(address)}: not of the form file:///path")
    path = Path(urllib.parse.unquote(rest))
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def _beside(target: Path, suffix: str) -> Path:
    """A helper file, under a name that is not taken for that of a copy, here or by the published tools."""
    return target.with_name(f"tmp_{target.name}.{suffix}")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Only one process at a time is inside, on a file."""
    import filelock

    lock = filelock.FileLock(_beside(target, "lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"Waiting for another process that fetches {target.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _verified(path: Path, url: str, checksum: str) -> Path:
    """
    Raises:
        UserError: the file does not have the SHA-256 sum `checksum` ('' = any).
    """
    if checksum and (actual := file_sha256(path)) != checksum:
        raise UserError(f"{_shown(url)}: wrong checksum, {path} has SHA-256 {actual}; delete it to fetch it again")
    return path


class _TryAgainError(Exception):
    """A download stopped short."""

    def __init__(self, reason: str, wait: float = 0):
        super().__init__(reason)
        self.wait = wait


def _download(url: str, target: Path, checksum: str, num_attempts: int, verbose: bool) -> None:
    """Fetch `url` as `target`, going on from what an earlier attempt has left."""
    import requests

    partial, version_file = _beside(target, "partial"), _beside(target, "version")
    failures = furthest = 0
    while True:
        try:
            _fetch_rest(url, partial, version_file, verbose)
            break
        except _TryAgainError as err:
            reason, wait = str(err), err.wait
        except UserError:
            raise
        except (ValueError, requests.exceptions.TooManyRedirects) as err:  # of this address, or one redirected to
            raise UserError(f"{_shown(url)}: {one_line(err)}: check the address") from None
        except requests.RequestException as err:
            cause = getattr(err.args[0], "reason", err) if err.args else err  # without the layers around it
            reason, wait = one_line(cause)[:150] or type(err).__name__, 0.0
        size = partial.stat().st_size if partial.is_file() else 0
        failures = 1 if size > furthest else failures + 1
        furthest = max(size, furthest)
        if failures >= num_attempts:
            raise RunError(f"{_shown(url)}: not fetched after {failures} attempts ({reason}); {size} bytes are kept")
        time.sleep(min(max(BACK_OFF * 2 ** (failures - 1), wait), MAX_BACK_OFF))

    if checksum and (actual := file_sha256(partial)) != checksum:
        aside = _beside(target, "mismatch")
        os.replace(partial, aside)
        version_file.unlink(missing_ok=True)
        raise UserError(f"{_shown(url)}: wrong checksum, SHA-256 {actual}; what came is put aside as {aside}")
    with open(partial, "rb") as f:
        os.fsync(f.fileno())
    os.replace(partial, target)
    version_file.unlink(missing_ok=True)


def _fetch_rest(url: str, partial: Path, version_file: Path, verbose: bool) -> None:
    """One request for what is missing of `partial`, which grows as far as the connection lasts."""
    import requests
    from tqdm import tqdm

    # What the server said the version of the file was, and its length. Without that, or with another, the rest would
    # not fit to what is there.
    version, total = _read_version(version_file)
    have = partial.stat().st_size if partial.is_file() and version else 0
    headers = {"Accept-Encoding": "identity"}
    if have > 0:
        headers.update({"Range": f"bytes={have}-", "If-Range": version})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        answer, code = response.headers, response.status_code
        if code == 416 and have > 0 and answer.get("Content-Range") == f"bytes */{have}":
            return  # all of it was there
        if code == 416 or (code == 206 and not _goes_on(answer, have, version, total)):
            partial.unlink(missing_ok=True)
            raise _TryAgainError("the server does not go on from where the download stopped")
        if code in (408, 425, 429) or code >= 500:
            wait = answer.get("Retry-After", "")
            seconds = float(wait) if re.fullmatch(r"[0-9]{1,6}", wait) else 0.0
            raise _TryAgainError(one_line(f"{code} {response.reason}"), seconds)
        if code not in (200, 206):
            raise UserError(
                f"{_shown(url)}: the server says {one_line(f'{code} {response.reason}')}: check the address"
            )
        if code == 200:
            if answer.get("Content-Type", "").startswith("text/html") and not partial.stem.endswith((".html", ".htm")):
                raise UserError(f"{_shown(url)}: the server sends a web page instead of the file: check the address")
            have = 0
            encoded = "Content-Encoding" in answer  # its lengths are not those of the file
            length = answer.get("Content-Length", "")
            total = int(length) if re.fullmatch(r"[0-9]{1,18}", length) and not encoded else None
            partial.unlink(missing_ok=True)
            version_file.write_text("" if encoded or total is None else f"{total} {_version(answer)}")
        with (
            open(partial, "ab") as f,
            tqdm(
                desc=partial.stem.split("_", 2)[2],
                total=total,
                initial=have,
                unit="B",
                unit_scale=True,
                disable=None if verbose else True,
                dynamic_ncols=True,
            ) as progress,
        ):
            for data in response.iter_content(1 << 16):  # what a broken connection leaves of such a part is lost
                f.write(data)
                progress.update(len(data))
            size = f.tell()
    if size == 0 or (total is not None and size != total):
        raise _TryAgainError(f"the connection ended after {size} of {total or 'unknown'} bytes")


def _version(answer: Mapping[str, str]) -> str:
    """What identifies the version of a file, in a form that If-Range takes; '' if the server does not say."""
    etag = answer.get("ETag", "")
    return etag if etag.startswith('"') else answer.get("Last-Modified", "")


def _read_version(version_file: Path) -> tuple[str, int | None]:
    try:
        match = re.fullmatch(r"([0-9]+) ([ -~]+)", version_file.read_text())
    except (OSError, UnicodeError):
        match = None
    return (match[2], int(match[1])) if match else ("", None)


def _goes_on(answer: Mapping[str, str], have: int, version: str, total: int | None) -> bool:
    """Whether a partial answer is the rest, or a piece of it, of the version whose first `have` bytes are there."""
    return (
        have > 0
        and _version(answer) in ("", version)
        and re.fullmatch(rf"bytes {have}-[0-9]+/{total}", answer.get("Content-Range", "")) is not None
    )


def _hub_file(url: str) -> Path:
    """A file of the Hugging Face hub, hf://owner/repo[@revision]/file, through its own library and cache."""
    match = re.fullmatch(r"hf://([^/@\s]+/[^/@\s]+)(?:@([^/\s]+))?/([^\s]+)", url, re.IGNORECASE)
    if match is None:
        raise UserError(f"{_shown(url)}: not of the form hf://owner/repo/file")
    import huggingface_hub
    from huggingface_hub import errors

    repo, revision, name = match.groups()
    try:
        if offline():
            path = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
            if not isinstance(path, str):
                raise UserError(
                    f"{url} is needed and no network is wanted ({OFFLINE_VARIABLE}=1): fetch it where there is one by "
                    f"python snapshot_tool.py prefetch {url}, and bring the cache of huggingface_hub (HF_HOME)"
                )
            return Path(path)
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    except UserError:
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError, ValueError) as err:
        if not isinstance(err, errors.LocalEntryNotFoundError):
            raise UserError(f"{url}: not to be had from the hub ({one_line(err)})") from None
        # That nothing is kept is not the reason why nothing came.
        raise RunError(f"{url}: not fetched from the hub ({one_line(err.__cause__ or err)})") from None
    except Exception as err:  # the library lets through what those that it is built on raise
        raise RunError(f"{url}: not fetched from the hub ({one_line(err)})") from None
