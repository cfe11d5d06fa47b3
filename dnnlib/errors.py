"""Failures that a user sees as one line."""

import contextlib
import json
import os
import re
import time

OUT_OF_MEMORY = "out of memory: use smaller batches (--batch-gpu in training, --batch elsewhere) or a smaller network"


class UserError(ValueError):
    """A mistake in the user's input. The message says what is wrong, where, and what to do, in one line."""


class DamagedFileError(UserError):
    """A file does not hold what its writer wrote, so that another copy of it may help."""


class RunError(RuntimeError):
    """A failure at run time that no traceback would explain better than its message, which is one line."""


def tell_torchrun(message: str) -> None:
    """Have torchrun, where it started this process, end its own report with the message that explains the failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            # Whole or not at all: torchrun would fail at half a file, as a full disk leaves it.
            with open(f"{path}.tmp", "w") as f:
                json.dump({"message": message, "timestamp": int(time.time())}, f)
            os.replace(f"{path}.tmp", path)


def one_line(text: object) -> str:
    """At most 300 printable characters of a message from elsewhere."""
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())[:300]


def printable_url(url: str) -> str:
    """An address as it may be printed: on one line and without a password."""
    return re.sub(r"//[^/@]*@", "//", one_line(url))
