"""A real browser for tests of the report: Chromium as Debian packages it, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS_TO_INSTALL = 240


class BrowserUnavailable(Exception):
    """There is no browser here; the message says why."""


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser. Raises BrowserUnavailable where there is none and none can be installed."""
    program = find_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--disable-gpu"])
        yield running
        running.close()


def find_browser() -> str:
    """The program, installed with apt where that is possible."""
    if found := _installed():
        return found
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise BrowserUnavailable("no Chromium is installed, and apt-get as root could not be used to install one")
    quiet: dict[str, Any] = {"capture_output": True, "timeout": SECONDS_TO_INSTALL, "text": True}
    quiet["env"] = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(["apt-get", "update", "-q"], **quiet)
        done = subprocess.run(["apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium"], **quiet)
    except subprocess.TimeoutExpired:
        raise BrowserUnavailable(f"apt-get took longer than {SECONDS_TO_INSTALL} s to install Chromium") from None
    if found := _installed():
        return found
    raise BrowserUnavailable(f"apt-get could not install Chromium: {(done.stderr.splitlines() or [''])[-1]}")


def _installed() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)
