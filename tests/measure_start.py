"""From nothing to the first sound of the page.

    PYTHONPATH=tests/serve:. python tests/measure_start.py

Clones this repository, runs `python run.py serve` in the clone without a cache of pip, opens the
page in headless Chromium, clicks the first example, and prints the seconds from the start of the
clone to each step, with the processor. `--source URL` clones from there, over the network. It needs
Chromium, and playwright of requirements-dev.txt.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure_page import FLAGS
from playwright.sync_api import sync_playwright
from test_page import PATIENCE_MS, find_browser, wait, wait_for_player

ROOT = Path(__file__).parents[1]


def processor() -> str:
    """The name of the processor and the number of its cores that may be used."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def begin_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """Run the command of the README in a clone -> its process and the address that it prints."""
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    environment.pop("PYTHONPATH", None)  # of this script
    command = [sys.executable, "run.py", "serve", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if " at http" in line:
            return process, line.split(" at ")[1].split()[0]
    raise SystemExit(f"the server ended with exit code {process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the time to the first sound of the page.")
    parser.add_argument("--source", default=str(ROOT), help="the repository to clone")
    arguments = parser.parse_args()
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        browser = play.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        clone = Path(folder) / "minomni"
        begin = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", arguments.source, str(clone)], check=True)
        seconds = {"cloned": time.monotonic() - begin}
        process, url = begin_server(clone)
        try:
            seconds["serving"] = time.monotonic() - begin
            page.goto(url)
            wait(page, "document.querySelector('#list button')")
            page.locator("#list button").first.click()
            wait_for_player(page, "first")
            seconds["first sound"] = time.monotonic() - begin
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            browser.close()
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()), f"({processor()})")


if __name__ == "__main__":
    main()
