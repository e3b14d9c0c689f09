"""A real browser for the tests of pages, where chromium and chromedriver are installed."""
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

needs_browser = pytest.mark.skipif(not (shutil.which("chromedriver") and shutil.which("chromium")),
                                   reason="needs chromium and chromedriver")


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


class Browser:
    """Chromium without a window, driven by chromedriver (W3C WebDriver)."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(["chromedriver", f"--port={self.port}"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.is_ready, 20)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                   "--disable-background-networking", "--disable-component-update",
                   f"--user-data-dir={folder}", "--window-size=1000,900"]
        wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": options}}}
        self.session = f"/session/{self.call('/session', capabilities=wanted)['sessionId']}"

    def is_ready(self):
        try:
            return self.call("/status")["ready"]
        except OSError:
            return False

    def call(self, path, method="POST", **body):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if body:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.call(f"{self.session}/execute/sync", script=script, args=[])

    def click(self, css):
        found = self.call(f"{self.session}/element", using="css selector", value=css)
        element, = found.values()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{self.session}/element/{element}/click", data=b"{}")
        urllib.request.urlopen(request, timeout=60).close()

    def close(self):
        """End the session first: chromedriver alone leaves its browser running."""
        address = f"http://127.0.0.1:{self.port}{self.session}"
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="DELETE"),
                                   timeout=30).close()
        finally:
            self.process.terminate()
            self.process.wait()
