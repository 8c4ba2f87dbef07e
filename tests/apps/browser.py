"""A real Chromium without a window, spoken to over two pipes: no driver, no port, no package of its own."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 30.0  # seconds


def chromium() -> str | None:
    """Where there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser.

    Args:
        profile: an empty folder.
        size: of the window, pixels.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 1100)):
        self._profile = profile
        command = [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
            "about:blank",
        ]
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (there, back)]  # clear of 3 and 4, which it speaks through

        def three_and_four():
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            command,
            preexec_fn=three_and_four,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (there, back, *high):
            os.close(fd)
        os.set_blocking(self._in, False)
        self._rest, self._number, self._session = b"", 0, None
        self.errors = []  # of the page's scripts, and what it was not allowed to load
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self.call(f"{part}.enable")

    def call(self, method: str, **given) -> dict:
        """A command of the DevTools protocol; -> its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, address: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=address)

    def value(self, expression: str):
        """What a JavaScript expression gives; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def until(self, expression: str):
        """Wait until an expression is true; -> it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := self.value(expression):
                    return found
            except RuntimeError:  # the page is on its way
                pass
            time.sleep(0.05)
        raise AssertionError(f"never true: {expression} ({self.errors})")

    def point(self, selector: str, x: float, y: float) -> None:
        """Move the mouse to a place in an element, as shares of its size."""
        script = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{script}.scrollIntoView({{block: 'center'}})")
        box = self.value(
            f"(() => {{ const b = {script}.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] }})()"
        )
        where = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **where)

    def resize(self, width: int, height: int) -> None:
        """Of what the page believes its screen to be."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path) -> bytes:
        """A PNG of what is to be seen."""
        found = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(found)
        return found

    def close(self) -> None:
        """End the browser that this object has started, and remove what it leaves outside of its profile."""
        link = self._profile / "SingletonSocket"  # into a folder of the browser's own, which a signal leaves behind
        beside = link.readlink().parent if link.is_symlink() else None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        if beside is not None and beside.name.startswith("org.chromium."):
            shutil.rmtree(beside, ignore_errors=True)

    def _next(self) -> dict:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            try:
                self._rest += os.read(self._in, 2**16)
            except BlockingIOError:
                time.sleep(0.005)
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError("the browser does not answer")
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(event["params"]["exceptionDetails"]["exception"].get("description"))
        elif event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
            self.errors.append(event["params"]["entry"]["text"])
