"""Firefox and WebKit, driven by the protocols that browsers offer for it.

playwright brings builds of its own for these two, which distributions do not have. Firefox speaks
WebDriver BiDi over a WebSocket (https://w3c.github.io/webdriver-bidi), WebKitGTK has a server that
speaks WebDriver over HTTP (https://w3c.github.io/webdriver). Both do what the tests need: load a
page, evaluate expressions in it, press the mouse, and take pictures.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from serving import SECONDS, wait_until
from websockets.sync.client import connect

FIREFOX = ("firefox", "firefox-esr")
WEBKIT_DRIVER = "WebKitWebDriver"
# Where distributions keep its browser, below /usr.
WEBKIT_BROWSERS = ("lib*/webkit2gtk-*/MiniBrowser", "lib*/*/webkit2gtk-*/MiniBrowser")
LISTENING = "WebDriver BiDi listening on "
# A microphone that asks for no permission and hears a tone.
FIREFOX_PREFERENCES = {
    "media.navigator.permission.disabled": True,
    "media.navigator.streams.fake": True,
    "datareporting.policy.dataSubmissionEnabled": False,
    "app.update.disabledForTesting": True,
    "browser.shell.checkDefaultBrowser": False,
    # No requests of its own to the network.
    "services.settings.server": "data:,#no-remote-settings/v1",
    "app.normandy.enabled": False,
    "network.connectivity-service.enabled": False,
}


class Firefox:
    """A Firefox without a window and with an empty profile."""

    def __init__(self, folder: Path):
        """folder: an empty one, for the profile. Skips the test where there is no Firefox."""
        program = next(filter(None, map(shutil.which, FIREFOX)), None)
        if program is None:
            pytest.skip(f"no Firefox here: none of {', '.join(FIREFOX)} is on the PATH")
        lines = [
            f"user_pref({json.dumps(name)}, {json.dumps(value)});\n"
            for name, value in FIREFOX_PREFERENCES.items()
        ]
        (folder / "user.js").write_text("".join(lines))
        log = folder / "log"
        options = ["--headless", "--no-remote", "--profile", str(folder)]
        options += ["--remote-debugging-port", "0", "about:blank"]
        with log.open("w") as output:
            self.process = subprocess.Popen([program, *options], stderr=output, stdout=output)
        self.errors: list[str] = []  # of the console
        self.number = 0  # of the last command
        try:
            wait_until(lambda: LISTENING in log.read_text())
            address = log.read_text().split(LISTENING)[1].split()[0]
            self.socket = connect(
                f"{address}/session", open_timeout=SECONDS, max_size=None, legacy=True
            )
            self.call("session.new", capabilities={})
            self.call("session.subscribe", events=["log.entryAdded"])
            (tab,) = self.call("browsingContext.getTree")["contexts"]
            self.tab = tab["context"]
        except BaseException:
            self.process.kill()
            raise

    def call(self, method: str, **parameters) -> dict:
        """A command -> its result. Errors of the console that arrive before it are kept."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(command))
        while True:
            message = json.loads(self.socket.recv(timeout=SECONDS))
            if message.get("method") == "log.entryAdded":
                entry = message["params"]
                if entry["level"] in ("error", "warn"):
                    self.errors.append(entry["text"])
            elif message.get("id") == self.number:
                assert message["type"] == "success", message
                return message["result"]

    def goto(self, url: str) -> None:
        self.call("browsingContext.navigate", context=self.tab, url=url, wait="complete")

    def script(self, expression: str) -> dict:
        """The value of an expression, as the protocol describes it."""
        target = {"context": self.tab}
        found = self.call(
            "script.evaluate", expression=expression, target=target, awaitPromise=True
        )
        assert found["type"] == "success", found
        return found["result"]

    def evaluate(self, expression: str):
        """The value of an expression that JSON can hold."""
        return json.loads(self.script(f"JSON.stringify({expression}) ?? 'null'")["value"])

    def press(self, element: str) -> None:
        """Press the mouse on the element that an expression gives."""
        self.evaluate(f"({element}).scrollIntoView({{block: 'center'}})")
        shared = {"sharedId": self.script(element)["sharedId"]}
        origin = {"type": "element", "element": shared}
        move = {"type": "pointerMove", "x": 0, "y": 0, "origin": origin}
        self.mouse(move, {"type": "pointerDown", "button": 0})

    def release(self) -> None:
        self.mouse({"type": "pointerUp", "button": 0})

    def mouse(self, *actions: dict) -> None:
        source = {"type": "pointer", "id": "mouse", "actions": list(actions)}
        self.call("input.performActions", context=self.tab, actions=[source])

    def picture(self) -> bytes:
        """What the window shows, as PNG."""
        data = self.call("browsingContext.captureScreenshot", context=self.tab)["data"]
        return base64.b64decode(data)

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


class WebKit:
    """The small browser of WebKitGTK. It needs a display."""

    def __init__(self, folder: Path):
        """folder: an empty one. Skips the test where there is no WebKitGTK or no display."""
        program = shutil.which(WEBKIT_DRIVER)
        found = [path for pattern in WEBKIT_BROWSERS for path in Path("/usr").glob(pattern)]
        browser = min(found, default=None)
        if program is None or browser is None:
            pytest.skip(f"no WebKitGTK here: {WEBKIT_DRIVER} is not on the PATH")
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            pytest.skip("WebKitGTK needs a display, and there is none here")
        self.errors: list[str] = []  # this protocol does not tell what the console says
        port = free_port()
        self.process = subprocess.Popen([program, f"--port={port}"])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS)
        try:
            wait_until(self.is_ready)
            options = {"binary": str(browser), "args": ["--automation"]}
            wanted = {"alwaysMatch": {"webkitgtk:browserOptions": options}}
            self.session = ""
            self.session = self.call("POST", "", capabilities=wanted)["sessionId"]
        except BaseException:
            self.process.kill()
            raise

    def is_ready(self) -> bool:
        try:
            return self.client.get("/status").status_code == 200
        except httpx.TransportError:
            return False

    def call(self, method: str, path: str, **parameters):
        """A command -> its result."""
        address = f"/session/{self.session}{path}".rstrip("/")
        body = parameters if method == "POST" else None
        answer = self.client.request(method, address, json=body).json()
        assert "error" not in (answer["value"] or {}), answer
        return answer["value"]

    def goto(self, url: str) -> None:
        self.call("POST", "/url", url=url)

    def script(self, expression: str):
        return self.call("POST", "/execute/sync", script=f"return {expression}", args=[])

    def evaluate(self, expression: str):
        """The value of an expression that JSON can hold."""
        return json.loads(self.script(f"JSON.stringify({expression}) ?? 'null'"))

    def press(self, element: str) -> None:
        """Press the mouse on the element that an expression gives."""
        self.evaluate(f"({element}).scrollIntoView({{block: 'center'}})")
        move = {"type": "pointerMove", "x": 0, "y": 0, "origin": self.script(element)}
        self.mouse(move, {"type": "pointerDown", "button": 0})

    def release(self) -> None:
        self.mouse({"type": "pointerUp", "button": 0})

    def mouse(self, *actions: dict) -> None:
        source = {"type": "pointer", "id": "mouse", "actions": list(actions)}
        self.call("POST", "/actions", actions=[source])

    def picture(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self.call("GET", "/screenshot"))

    def close(self) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self.client.close()
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """A port that no one listens at."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as made:
        return made.getsockname()[1]
