"""A headless Chromium, driven through its debugging pipe (Chrome DevTools Protocol): needs no package of Python."""

import base64
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 30.0  # seconds for anything that a page does


def find_chromium() -> str | None:
    """The program, where it is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a browser with a profile of its own.

    Args:
        program: Chromium or Chrome.
        profile: an empty folder.
    """

    def __init__(self, program: str, profile: Path, width: int = 1280, height: int = 900):
        read, their_write = os.pipe()
        their_read, write = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]
        options += ["--no-sandbox"]  # root and containers cannot have one, and the pages are ours
        # The pipe is at 3 and 4.
        command = f"exec {shlex.join([program, *options, 'about:blank'])} 3<&{their_read} 4>&{their_write}"
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(their_read, their_write), stderr=subprocess.DEVNULL
        )
        os.close(their_read)
        os.close(their_write)
        self.pipe, self.answers = write, read
        self.rest, self.count, self.session = b"", 0, {}
        self.log: list[str] = []  # errors and warnings of the page
        (tab,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")
        self("Emulation.setFocusEmulationEnabled", enabled=True)  # as of the window that is in front
        self.resize(width, height)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        text = json.dumps(message).encode() + b"\0"
        while text:
            text = text[os.write(self.pipe, text) :]
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if answer.get("method") == "Runtime.exceptionThrown":
                self.log.append(json.dumps(answer["params"]["exceptionDetails"]))
            elif answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] in (
                "error",
                "warning",
            ):
                self.log.append(json.dumps(answer["params"]["entry"]))

    def _next(self) -> bytes:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.answers], [], [], PATIENCE)
            more = os.read(self.answers, 1 << 20) if ready else b""
            assert more, "the browser has ended, or hangs"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return message

    def open(self, url: str) -> None:
        self("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript on the page, awaited."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The value of an expression as soon as it counts as true."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.02)
        raise AssertionError(f"{script}: not in {PATIENCE:g} seconds; {self.log}")

    def press(self, key: str, code: int) -> None:
        """Press a key, by its name and Windows code."""
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def allow_clipboard(self) -> None:
        """Let the page read the clipboard, which browsers ask their users about."""
        session, self.session = self.session, {}
        self("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        self.session = session

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.pipe)
        os.close(self.answers)
