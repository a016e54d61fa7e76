"""A studio in a process of its own, and a headless browser that notes what it does; tools/screenshots.py uses both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOCAL = {"127.0.0.1", "localhost"}
ASIDE = {"data", "blob", "about", "chrome", "chrome-error"}
"""Schemes that ask nothing of any machine."""
PATIENCE = 180
"""Seconds that a page has; a busy machine needs them, an idle one does not."""


def no_browser() -> str | None:
    """Why no browser can be driven here; None when one can."""
    if not all(_binaries()):
        return "no Chromium with its chromedriver; on Debian: apt-get install chromium chromium-driver"
    return None


def open_browser() -> Any:
    """A headless Chromium that keeps its console and its requests."""
    from selenium import webdriver

    browser, driver = _binaries()
    options = webdriver.ChromeOptions()
    options.binary_location = browser or ""
    words = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking")
    for word in (*words, "no-first-run", "hide-scrollbars", "window-size=1280,900", "lang=en"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    session.set_script_timeout(PATIENCE)
    return session


def _binaries() -> tuple[str | None, str | None]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return browser, shutil.which("chromedriver")


class studio_in:
    """`with studio_in(folder, "model=runs/base") as url`: a studio of that folder until the end of the block."""

    def __init__(self, folder: Path, *words: str):
        self.command = [sys.executable, "-m", "volvelle", "studio", "port=0", *words]
        self.folder = folder

    def __enter__(self) -> str:
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line.startswith("http://"):
                return line.split()[0]
        raise AssertionError(f"the studio did not start:\n{''.join(said)}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            output, _ = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert "Traceback" not in output, output
        assert self.process.returncode in (0, 130, -15), output  # 130: Ctrl-C


@dataclass
class Page:
    """A browser at the studio. Checked at the end of a test: no complaint in its console, no request elsewhere."""

    driver: Any
    url: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, where: str) -> None:
        """Open an address such as "#/runs", as if it were typed, and wait until the room is there."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.url}{where}")
        self.settle()

    def settle(self) -> None:
        """Wait until the room that is being opened is there."""
        ready = "return !!document.querySelector('.room > *') && !document.querySelector('main[aria-busy]')"
        self.wait(lambda: self.run(ready))

    def run(self, script: str, *given: object) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script, *given)

    def wait(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Wait until the condition is true and return its value; elements may be exchanged meanwhile."""
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        passing = (NoSuchElementException, StaleElementReferenceException)
        waiting = WebDriverWait(self.driver, seconds, poll_frequency=0.05, ignored_exceptions=passing)
        return waiting.until(lambda _: condition())

    def all(self, selector: str) -> list[Any]:
        """The elements that a CSS selector finds."""
        return self.driver.find_elements("css selector", selector)

    def find(self, selector: str) -> Any:
        """The first visible element that a CSS selector finds, as soon as there is one."""
        return self.wait(lambda: next((one for one in self.all(selector) if one.is_displayed()), None))

    def click(self, selector: str) -> None:
        """Click the first visible element that a CSS selector finds."""
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", self.find(selector))
        self.wait(lambda: self.find(selector).click() is None)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        from selenium.webdriver.support.ui import Select

        Select(self.find(selector)).select_by_value(value)

    def press(self, *keys: str) -> None:
        """Press keys (selenium's Keys, or letters) where the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> Any:
        """The element that has the focus."""
        return self.driver.switch_to.active_element

    def text(self, selector: str = "main") -> str:
        """What is to be read there."""
        return self.find(selector).text

    def size(self, width: int, height: int = 900) -> None:
        """Give the page a size, in px; a narrow one is a phone's."""
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)

    def scheme(self, name: str) -> None:
        """What the system says of colours: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def overflow(self) -> list[str]:
        """What reaches over the page's right edge; empty when nothing scrolls sideways."""
        return self.run(
            """const wide = document.documentElement.scrollWidth > innerWidth;
            return wide ? [...document.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right >
              innerWidth + 1).map((one) => one.tagName + "." + one.getAttribute("class")).slice(0, 12) : [];"""
        )

    def note(self) -> None:
        """Take what the browser wrote down since the last time."""
        for entry in self.driver.get_log("browser"):
            self.complaints.append(f"{entry['level']}: {entry['message']}")
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])

    def elsewhere(self) -> list[str]:
        """The requests that left this machine."""
        parts = ((url, urlsplit(url)) for url in self.requests)
        return [url for url, part in parts if part.scheme not in ASIDE and part.hostname not in LOCAL]


class watched:
    """`with watched(chrome, url) as page`: a Page that is checked at the block's end."""

    def __init__(self, chrome: Any, url: str):
        self.page = Page(chrome, url)

    def __enter__(self) -> Page:
        page = self.page
        page.note()  # what earlier tests left
        page.complaints.clear()
        page.requests.clear()
        page.size(1280)
        page.scheme("light")
        return page

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.page.note()
        self.page.driver.get("about:blank")
        if kind is None:
            assert self.page.complaints == []
            assert self.page.requests, "the browser asked for nothing: it was not watched"
            assert self.page.elsewhere() == []
