"""A headless Chromium, driven over its DevTools pipe with nothing but the standard library.

    with Browser(path) as page:            # path: of the browser, from find()
        page.open("file:///tmp/test.html")
        page.evaluate("document.title")

CHROMIUM names a browser that is not on the PATH.
"""
import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """The path of a Chromium, or None where none is installed."""
    given = os.environ.get("CHROMIUM")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a headless Chromium; downloads go to its folder `downloads`."""

    def __init__(self, path):
        self.folder = tempfile.TemporaryDirectory()
        self.downloads = f"{self.folder.name}/downloads"
        os.mkdir(self.downloads)

        # Chromium reads commands from descriptor 3 and writes answers to 4
        self.commands, ours = os.pipe(), os.pipe()
        shell = f'exec "$0" "$@" 3<&{self.commands[0]} 4>&{ours[1]}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                   "--autoplay-policy=no-user-gesture-required", "--mute-audio",
                   f"--user-data-dir={self.folder.name}/profile", "about:blank"]
        self.process = subprocess.Popen(["bash", "-c", shell, path, *options],
                                        pass_fds=(self.commands[0], ours[1]),
                                        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(self.commands[0])
        os.close(ours[1])
        self.answers = os.fdopen(ours[0], "rb")
        self.number = 0
        self.buffer = b""
        self.session = None

    def __enter__(self):
        target = next(target for target in self.call("Target.getTargets")["targetInfos"]
                      if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"],
                                 flatten=True)["sessionId"]
        self.call("Page.enable")
        session, self.session = self.session, None
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=self.downloads)
        self.session = session
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.commands[1])
        self.answers.close()
        self.folder.cleanup()

    def read(self):
        """The next message."""
        while b"\0" not in self.buffer:
            piece = os.read(self.answers.fileno(), 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        """One DevTools command -> its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands[1], json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, url):
        """Load a page and wait until it has been read."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait(self, script, seconds=10):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(script):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds} s: {script}")
            time.sleep(0.02)

    def press(self, key):
        """Press and release one key."""
        for event in ("keyDown", "keyUp"):
            text = {"text": key} if event == "keyDown" and len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type=event, key=key, **text)

    def touch(self, selector):
        """Touch the middle of an element."""
        x, y = self.evaluate(f"""(() => {{
            const box = document.querySelector({json.dumps(selector)});
            box.scrollIntoView({{block: "center"}});
            const r = box.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2];
        }})()""")
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
