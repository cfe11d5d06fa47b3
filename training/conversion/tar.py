"""Tar files read from the first member to the last, with little memory, and with damage noticed."""

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dnnlib.errors import UserError
from training.dataset.listing import is_image


class TarContents(NamedTuple):
    """Names of the files in a tar file, in its order, and its dataset.json."""

    names: list[str]
    labels_json: bytes | None


def list_tar(path: Path) -> TarContents:
    """What is in a tar file.

    Raises:
        UserError: an image in it is a link to another file.
        tarfile.TarError: it is damaged.
    """
    names, text = [], None
    with tarfile.open(path) as archive:
        for member in tar_members(archive):
            if is_image(member.name) and (member.islnk() or member.issym()):
                raise UserError(
                    f"--source={path}: {member.name} is a link, not an image: unpack the file and give the folder"
                )
            if member.isfile():
                names.append(posixpath.normpath(member.name))
                text = read_member(archive, member) if names[-1] == "dataset.json" else text
    return TarContents(names, text)


def tar_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file.

    Raises:
        tarfile.TarError: it does not end as such files do; Python takes a damaged header for the end.
    """
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # else all are kept
        yield member
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or len(block) not in (0, tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")
    while rest := archive.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more data follows its end; split joined tar files again")


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The contents of a member; b'' if it is no file."""
    f = archive.extractfile(member)
    return f.read() if f is not None else b""
