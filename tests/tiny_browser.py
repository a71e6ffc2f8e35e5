"""A headless Chromium, driven through its DevTools protocol over a pipe; needs no package."""

import base64
import io
import json
import os
import shutil
import subprocess
import time

import numpy as np
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)


class BrowserError(Exception):
    """The browser refused a call, such as when its page was just loading another one."""


class Browser:
    """A browser with one open page.

    Args:
        folder: for its profile.

    Attributes:
        complaints: errors and warnings of the page's console, refused content and exceptions.
        requests: addresses that the page asked for, but for data: URIs.
    """

    def __init__(self, folder):
        self.complaints, self.requests, self._number = [], [], 0
        (child_in, self._out), (self._in, child_out) = os.pipe(), os.pipe()

        def as_three_and_four():
            copies = os.dup(child_in), os.dup(child_out)  # neither is 3 or 4 by now
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=as_three_and_four, close_fds=False, **quiet)
        os.close(child_in), os.close(child_out)
        os.set_blocking(self._in, False)
        self._unread, self._session = b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in), os.close(self._out)

    def call(self, method, **params):
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(answer["error"])
                return answer["result"]
            self._note(answer)

    def open(self, page, width=1280, height=800, dark=False):
        """Open a file in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete'")

    def wait(self, condition):
        """Wait until an expression in the page is true, whatever page it is by then."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if self.run(condition):
                    return
            except BrowserError:
                pass
            time.sleep(0.05)
        raise TimeoutError(condition)

    def run(self, script):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise BrowserError(found["exceptionDetails"])
        return found["result"].get("value")

    def screen(self):
        """What is seen: (H, W, 3) int."""
        png = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)

    def _note(self, event):
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])
        elif kind in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(params)

    def _read(self):
        deadline = time.monotonic() + 120
        while b"\0" not in self._unread:
            assert time.monotonic() < deadline, "the browser does not answer"
            assert self._process.poll() is None, "the browser has ended"
            try:
                self._unread += os.read(self._in, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)
