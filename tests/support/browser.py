"""A browser for the reports' pages: headless Chromium, controlled over its debugging pipe, so that
pages are laid out at a phone's width and in a dark scheme (a window cannot be that narrow)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless", "--disable-gpu", "--no-sandbox", "--hide-scrollbars", "--no-first-run"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--remote-debugging-pipe"),
)
PATIENCE = 120  # seconds per answer, on a busy machine


class Browser:
    """A page in its own browser. Skips the test if no browser starts."""

    def __init__(self, folder: Path) -> None:
        name = next((name for name in NAMES if shutil.which(name)), None)
        if name is None:
            pytest.skip(f"no browser on this machine ({', '.join(NAMES)})")
        ends = [*os.pipe(), *os.pipe()]
        theirs_in, self.out, self.back, theirs_out = (fcntl(x, F_DUPFD_CLOEXEC, 10) for x in ends)
        for end in ends:
            os.close(end)
        self.sent, self.rest, self.session = 0, b"", None

        def places() -> None:  # it reads commands from descriptor 3 and answers on 4
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self.process = subprocess.Popen(
            [name, *OPTIONS, f"--user-data-dir={folder / 'profile'}"],
            preexec_fn=places, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
        except OSError as error:
            self.close()
            pytest.skip(f"{name} does not start here: {error}")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]

    def call(self, method: str, **parameters) -> dict:
        """The result of one command of the DevTools protocol."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self.rest:
                if not select.select([self.back], [], [], max(0, until - time.monotonic()))[0]:
                    raise TimeoutError(f"no answer to {method} in {PATIENCE} s")
                read = os.read(self.back, 1 << 20)
                if not read:
                    raise BrokenPipeError(f"it ended at {method}")
                self.rest += read
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def show(self, path: Path, width: int, scheme: str) -> None:
        """Lays the file out at `width`, such as a phone's; scheme: light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=844, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=path.as_uri())
        until = time.monotonic() + PATIENCE
        while self.ask("location.href + document.readyState") != f"{path.as_uri()}complete":
            assert time.monotonic() < until, f"{path.name} is not drawn after {PATIENCE} s"
            time.sleep(0.05)

    def ask(self, expression: str):
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> Path:
        """The whole page as a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def close(self) -> None:
        """Ends the browser. Closing its pipes would too, but only later."""
        for descriptor in (self.out, self.back):
            os.close(descriptor)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
            return
        self.process.kill()
        self.process.wait()
