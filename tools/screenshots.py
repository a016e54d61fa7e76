"""The pictures of docs/studio.md: python tools/screenshots.py FOLDER, where FOLDER/runs holds what they are to show.

They are taken by hand when the studio changes its looks. Fonts are the system's: for the figures in the repository a
Palatino (fonts-urw-base35) and a Chinese font (fonts-wqy-zenhei) were installed.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
LARGEST = 200 * 1024
STATUS = ".room-vision > .split [role=status]"
sys.path.insert(0, str(ROOT))

from tests.serve.studio.browser import Page, no_browser, open_browser, studio_in  # noqa: E402


@dataclass(frozen=True)
class Shot:
    """One picture: its name, the address, the size in px, the scheme, what is done, and what is to be there then."""

    name: str
    where: str
    width: int = 1280
    height: int = 860
    scheme: str = "light"
    until: str = "h1"
    act: Callable[[Page], object] | None = None


def race(page: Page) -> None:
    """An answer without drafts and with them."""
    page.click(".composer .chips button:last-child")
    page.wait(lambda: "parameters" in page.text(".composer [role=status]"))
    page.click(".composer .bar button:nth-child(2)")
    page.wait(lambda: page.find(".verdict").text, 300)


def ring(page: Page) -> None:
    """The ring, in its third step."""
    page.click(".choices .primary")
    page.wait(lambda: page.find(".player output").text.startswith("step 3"))
    page.click(".player button:nth-child(2)")


def clicked(page: Page) -> None:
    """Objects found in a drawn scene, and a mask from a click on the middle of the first."""
    page.wait(lambda: page.find(".over").get_dom_attribute("viewBox"))
    page.wait(lambda: _press(page, "Detect"))
    page.wait(lambda: "objects in" in page.text(STATUS), 60)
    ActionChains(page.driver).move_to_element(page.find(".over rect")).click().perform()
    page.wait(lambda: "estimated IoU" in page.text(STATUS), 60)


def _press(page: Page, name: str) -> bool:
    """Click the button of that name, once it can be clicked."""
    button = next(one for one in page.all("button") if one.text == name)
    return button.is_enabled() and button.click() is None


SHOTS = (
    Shot("home", "#/?family=attention", until=".card"),
    Shot("home-dark", "#/?family=position", scheme="dark", until=".card"),
    Shot("technique", "#/technique/rope", height=1000, until=".code"),
    Shot("claims", "#/claims", until=".claims tbody tr"),
    Shot("runs", "#/runs/segmenter", until=".chart"),
    Shot("chat", "#/chat", height=900, act=race),
    Shot("field", "#/inspect/field", height=900, until=".tall tr.here"),
    Shot("ring", "#/inspect/ring", height=900, act=ring),
    Shot("vision", "#/vision", height=900, act=clicked),
    Shot("phone", "#/technique/rope", width=390, height=860, until=".equation"),
)


def take(page: Page, shot: Shot) -> None:
    """Take one picture and write it with few colours, which a page of text has."""
    page.size(shot.width, shot.height)
    page.scheme(shot.scheme)
    page.open(shot.where)
    if shot.act is not None:
        shot.act(page)
    page.find(shot.until)
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    page.wait(lambda: page.run("return [...document.images].every((one) => one.complete || one.loading === 'lazy')"))
    page.run("return new Promise((done) => setTimeout(done, 900))")  # the wheel's hand comes to rest
    seen = Image.open(io.BytesIO(base64.b64decode(page.driver.get_screenshot_as_base64())))
    path = PICTURES / f"studio-{shot.name}.png"
    seen.convert("RGB").quantize(255, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    size = path.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"error: {path} has {size:,} bytes, more than {LARGEST:,}")
    print(f"{path.relative_to(ROOT)}  {seen.width} x {seen.height}, {size:,} bytes")


def main(folder: str, *names: str) -> None:
    """Take all pictures, or those named."""
    if (why := no_browser()) is not None:
        raise SystemExit(f"error: {why}")
    PICTURES.mkdir(exist_ok=True)
    with studio_in(Path(folder)) as url:
        driver = open_browser()
        try:
            for shot in SHOTS:
                if not names or shot.name in names:
                    take(Page(driver, url), shot)
        finally:
            driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
