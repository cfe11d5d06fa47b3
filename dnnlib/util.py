"""The published names EasyDict and open_url, and the version of this code."""

import functools
import subprocess
from pathlib import Path
from typing import Any

import dnnlib
from dnnlib.download import open_url as open_url


class EasyDict(dict):
    """Dictionary whose items can be read and written as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


@functools.cache
def code_version() -> str:
    """Version of this code, with the commit where it runs from a git checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return dnnlib.__version__
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return dnnlib.__version__
    return f"{dnnlib.__version__}+{commit}"
