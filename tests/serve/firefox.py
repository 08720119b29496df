"""Firefox, driven by the protocol that it offers for it.

playwright needs a build of its own, which distributions do not have. Any Firefox speaks WebDriver
BiDi over a WebSocket (https://w3c.github.io/webdriver-bidi). It does what the tests need: load a
page, evaluate expressions in it, press the mouse, and take pictures.
"""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import SECONDS, wait_until
from websockets.sync.client import connect

FIREFOX = ("firefox", "firefox-esr")
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
