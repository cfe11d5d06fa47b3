"""Files at URLs, fetched once and kept."""

import hashlib
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dnnlib.errors import DamagedFileError, RunError, UserError, one_line, printable_url
from dnnlib.files import file_sha256, locked

CACHE_VARIABLE = "DNNLIB_CACHE_DIR"  # where downloads are kept, ~/.cache/dnnlib by default
OFFLINE_VARIABLE = "OPENEDM2_OFFLINE"  # 1 = use nothing but what is kept
NUM_ATTEMPTS = 5  # without getting any further
Result = TypeVar("Result")
KNOWN_SHA256: dict[str, str] = {}  # by URL; none has been published yet for the files used here


def open_url(
    url: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    num_attempts: int = NUM_ATTEMPTS,
    verbose: bool = True,
    return_filename: bool = False,
) -> Any:
    """Open a file, or a URL (http, https, file, hf://owner/repo/file) of which a copy is kept.

    Interrupted downloads resume. Of several processes that want a file, one fetches it.

    Args:
        url: may end in `#sha256=...`, which the contents must match.
        cache_dir: where copies are kept; default: $DNNLIB_CACHE_DIR/downloads.
        num_attempts: how often to try without getting any further.
        verbose: show a progress bar on terminals.
        return_filename: return the path of the file instead of an open one.

    Returns:
        A binary file open for reading, or a path as str.

    Raises:
        UserError: no such file, a wrong address or checksum, or not in the cache while no network is wanted.
        RunError: it could not be fetched now.
    """
    path = _local_path(os.fspath(url), cache_dir, num_attempts, verbose)
    return str(path) if return_filename else open(path, "rb")


def with_good_copy(url: str | os.PathLike, read: Callable[[], Result]) -> Result:
    """The result of `read`, which reads the file at a URL through `open_url`.

    Where it finds the kept copy damaged, that is fetched again, once. Anything but a URL of a web server is just read.

    Raises:
        DamagedFileError: the file is damaged, also when it comes again.
    """
    url = os.fspath(url)
    address = url.partition("#")[0]
    if not re.match("https?://", address, re.IGNORECASE) or offline():
        return read()
    before = _version_of(_kept_copy(address))
    try:
        return read()
    except DamagedFileError as err:
        found = err
    copy = _kept_copy(address)
    mark = _beside(copy, "damaged")  # says which copy has come twice
    if not (mark.is_file() and mark.read_text() == file_sha256(copy)):
        print(f"{found}; fetching it again", file=sys.stderr)
        _fetch_again(address, copy, before)
        try:
            return read()
        except DamagedFileError as err:
            found = err
        mark.write_text(file_sha256(copy))
    raise DamagedFileError(f"{found}; it has come so twice: delete {copy} to fetch it once more")


def is_url(text: str) -> bool:
    """Whether a text begins as a URL does, of whatever scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def offline() -> bool:
    """Whether the user wants no network to be used."""
    return os.environ.get(OFFLINE_VARIABLE, "0") not in ("", "0")


def _local_path(url: str, cache_dir: str | os.PathLike | None, num_attempts: int, verbose: bool) -> Path:
    """Where the file is on this machine, fetched if need be."""
    if not is_url(url):
        if not os.path.isfile(url):
            raise UserError(f"{url}: {'a folder, not a file' if os.path.isdir(url) else 'no such file'}")
        return Path(url)
    address, checksum = _split_checksum(url)
    scheme = address.partition(":")[0].lower()
    if scheme == "file":
        path = _file_path(address)
    elif scheme == "hf":
        path = _hub_file(address)
    else:
        checksum = checksum or KNOWN_SHA256.get(address, "")
        path = _cached(address, checksum, cache_dir, num_attempts, verbose)
    if checksum and (actual := file_sha256(path)) != checksum:
        raise DamagedFileError(
            f"{printable_url(url)}: wrong checksum, {path} has SHA-256 {actual}; delete it to fetch it again"
        )
    return path


def _cached(address: str, checksum: str, cache_dir: str | os.PathLike | None, num_attempts: int, verbose: bool) -> Path:
    """The copy of a file of a web server, fetched if there is none."""
    target = _kept_copy(address, cache_dir)
    if target.is_file():
        return target
    if offline():
        raise UserError(
            f"{printable_url(address)} is needed and no network is wanted ({OFFLINE_VARIABLE}=1): fetch it where there "
            f"is one by python snapshot_tool.py prefetch {printable_url(address)}, or save it as {target}"
        )
    with _alone(target):
        if not target.is_file():  # else another process has fetched it meanwhile
            _download(address, target, checksum, num_attempts, verbose)
    return target


def _kept_copy(address: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Where the copy of a file of a web server is, or would be."""
    target = _cache_folder(cache_dir) / _cache_name(address)
    kept = sorted(target.parent.glob(f"{target.name.partition('_')[0]}_*"))
    return next((path for path in kept if path.is_file()), target)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Inside, no other process fetches the same file."""

    def busy() -> None:
        print(f"Waiting for another process that fetches {target.name}", file=sys.stderr)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(_beside(target, "lock"), busy):
            yield
    except OSError as err:
        raise UserError(
            f"{target.parent}: cannot keep downloads here ({err.strerror or err}): set {CACHE_VARIABLE}"
        ) from None


def _fetch_again(address: str, copy: Path, before: tuple[int, int] | None) -> None:
    """Replace a kept copy, unless another process has done so since it was the version `before`."""
    with _alone(copy):
        if before in (None, _version_of(copy)):
            _beside(copy, "partial").unlink(missing_ok=True)
            _download(address, copy, "", NUM_ATTEMPTS, verbose=True)


def _version_of(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None if there is none."""
    with suppress(OSError):
        facts = path.stat()
        return facts.st_ino, facts.st_mtime_ns
    return None


def _cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/dnnlib").expanduser() / "downloads"
    except RuntimeError as err:
        raise UserError(f"{CACHE_VARIABLE}={os.environ.get(CACHE_VARIABLE)}: {err}") from None


def _cache_name(address: str) -> str:
    """Name of the copy of http(s)://..., by which the published tools find it, too: they look at the hash alone."""
    try:
        parts = urllib.parse.urlsplit(address)
        key = hashlib.md5(address.encode(), usedforsecurity=False).hexdigest()
    except ValueError:
        parts, key = None, ""
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"{printable_url(address)}: not an address of the form http(s)://, file:/// or hf://owner/repo/file"
        )
    return f"{key}_{re.sub(r'[^0-9a-zA-Z._-]', '_', parts.path.rsplit('/', 1)[-1])[-128:]}"


def _split_checksum(url: str) -> tuple[str, str]:
    """The address and the sum of 'address#sha256=sum', '' if there is none."""
    match = re.fullmatch(r"(.*)#sha256=(.*)", url, re.IGNORECASE | re.DOTALL)
    if match is None:
        return url, ""
    if not re.fullmatch(r"[0-9a-f]{64}", match[2], re.IGNORECASE):
        raise UserError(f"{printable_url(url)}: a SHA-256 sum has 64 hexadecimal digits")
    return match[1], match[2].lower()


def _file_path(address: str) -> Path:
    """The path of file:///path."""
    rest = re.sub(r"^file://(localhost(?=/))?", "", address, flags=re.IGNORECASE)
    if not rest.startswith("/"):
        raise UserError(f"{printable_url(address)}: not of the form file:///path")
    path = Path(urllib.parse.unquote(rest))
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def _beside(target: Path, suffix: str) -> Path:
    """A helper file, under a name that is not taken for that of a copy, here or by the published tools."""
    return target.with_name(f"tmp_{target.name}.{suffix}")


def _download(url: str, target: Path, checksum: str, num_attempts: int, verbose: bool) -> None:
    """Fetch `url` as `target`, resuming where an earlier attempt stopped."""
    from dnnlib.transfer import fetch  # takes a while, which most commands need not spend

    partial, version_file = _beside(target, "partial"), _beside(target, "version")
    fetch(url, partial, version_file, num_attempts, verbose)
    if checksum and (actual := file_sha256(partial)) != checksum:
        aside = _beside(target, "mismatch")
        os.replace(partial, aside)
        version_file.unlink(missing_ok=True)
        raise UserError(f"{printable_url(url)}: wrong checksum, SHA-256 {actual}: the download is put aside as {aside}")
    with open(partial, "rb") as f:
        os.fsync(f.fileno())
    os.replace(partial, target)
    version_file.unlink(missing_ok=True)


def _hub_file(url: str) -> Path:
    """A file of the Hugging Face hub, hf://owner/repo[@revision]/file, through its own library and cache."""
    match = re.fullmatch(r"hf://([^/@\s]+/[^/@\s]+)(?:@([^/\s]+))?/([^\s]+)", url, re.IGNORECASE)
    if match is None:
        raise UserError(f"{printable_url(url)}: not of the form hf://owner/repo/file")
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    repo, revision, name = match.groups()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it announces each of its attempts
    try:
        if offline() or not hub_is_known():
            path = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
            if not isinstance(path, str):
                if not offline():
                    raise RunError(f"{url}: not fetched from the hub (no network: its server is unknown here)")
                raise UserError(
                    f"{url} is needed and no network is wanted ({OFFLINE_VARIABLE}=1): fetch it where there is one by "
                    f"python snapshot_tool.py prefetch {url}, and bring the cache of huggingface_hub (HF_HOME)"
                )
            return Path(path)
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
    except (UserError, RunError):
        raise
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError, ValueError) as err:
        if not isinstance(err, errors.LocalEntryNotFoundError):
            raise UserError(f"{url}: not found on the hub ({one_line(err)})") from None
        # That nothing is kept is not the reason why nothing came.
        raise RunError(f"{url}: not fetched from the hub ({one_line(err.__cause__ or err)})") from None
    except Exception as err:  # the library lets through what those that it is built on raise
        raise RunError(f"{url}: not fetched from the hub ({one_line(err)})") from None
    finally:
        logging.set_verbosity(verbosity)


def hub_is_known() -> bool:
    """Whether the name of the Hugging Face hub's server can be looked up: without a network it cannot, and its library
    would try for half a minute."""
    from huggingface_hub import constants

    # Behind a proxy, names are its business; and the library has a way of its own to use no network.
    if urllib.request.getproxies() or constants.HF_HUB_OFFLINE:
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, None)
    except socket.gaierror:
        return False
    return True
