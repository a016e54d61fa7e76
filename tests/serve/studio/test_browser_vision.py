"""Vision in a real browser: clicks, boxes and keys, kept objects, what is saved, with models of random weights."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from tests.serve.studio.browser import studio_in, watched
from tests.serve.studio.vision_runs import write_runs

pytest.importorskip("selenium", reason="wants the extra dev")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.browser

STATUS = ".room-vision > .split [role=status]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs and a picture."""
    found = tmp_path_factory.mktemp("seen")
    write_runs(found / "runs")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((300, 200)).save(buffer, "PNG")
    (found / "photo of mine.png").write_bytes(buffer.getvalue())
    return found


@pytest.fixture(scope="module")
def studio(folder):
    with studio_in(folder) as url:
        yield url


@pytest.fixture
def page(chrome, studio, folder):
    """The room with the picture open."""
    with watched(chrome, studio) as found:
        found.open("#/vision")
        found.all("#file")[0].send_keys(str(folder / "photo of mine.png"))
        found.wait(lambda: found.find(".over").get_dom_attribute("viewBox") == "0 0 300 200")
        yield found


def at(page, x, y):
    """Move to a place of the picture, as a share of its sides."""
    over = page.find(".over")
    page.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", over)
    size = over.size
    chain = ActionChains(page.driver)
    return chain.move_to_element_with_offset(over, int((x - 0.5) * size["width"]), int((y - 0.5) * size["height"]))


def said(page):
    """What was answered last."""
    return page.wait(lambda: "mask" in (text := page.text(STATUS)) and text)


def press(page, name):
    """Click the button of that name once it can be clicked."""
    page.wait(lambda: next(one for one in page.all("button") if one.text == name and one.is_enabled()).click() is None)


def test_clicks_give_masks_that_are_kept_named_and_saved(page, folder):
    at(page, 0.3, 0.4).click().perform()
    assert "estimated IoU" in said(page)
    assert len(page.all(".over .on")) == 1
    at(page, 0.7, 0.6).key_down(Keys.SHIFT).click().key_up(Keys.SHIFT).perform()
    page.wait(lambda: len(page.all(".over .off")) == 1)
    said(page)
    label = page.find("#label")
    label.clear()
    label.send_keys("cup")
    press(page, "Keep")
    assert page.wait(lambda: page.find(".objects input").get_attribute("value")) == "cup"
    assert not page.all(".over .on")
    press(page, "Save for training")
    page.wait(lambda: "1 objects of 1 pictures" in page.text(".tools"))
    document = json.loads((folder / "runs" / "annotated" / "objects.json").read_text())
    assert [one["name"] for one in document["categories"]] == ["cup"]
    assert document["annotations"][0]["point_coords"][0][0] == pytest.approx(90, abs=2)
    assert document["images"][0]["file_name"].startswith("photo-of-mine-")
    page.click(".objects button")
    page.wait(lambda: "none yet" in page.text(".objects"))


def test_a_box_is_drawn_by_dragging(page):
    at(page, 0.2, 0.2).click_and_hold().move_by_offset(150, 90).release().perform()
    said(page)
    assert len(page.all(".over .asked")) == 1
    assert not page.all(".over .on")
    press(page, "Undo")
    page.wait(lambda: not page.all(".over .asked"))


def test_keys_do_what_the_pointer_does(page):
    page.run("document.querySelector('.over').focus({focusVisible: true})")
    page.press(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ENTER)
    said(page)
    assert len(page.all(".over .on")) == 1
    assert page.all(".over .cross")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.wait(lambda: len(page.all(".over .off")) == 1)
    page.press(Keys.BACKSPACE)
    page.wait(lambda: not page.all(".over .off"))
    page.wait(lambda: page.find(".tools .primary").is_enabled())
    page.press("k")
    page.wait(lambda: len(page.all(".objects input")) == 1)


def test_found_boxes_become_masks(page):
    press(page, "Detect")
    page.wait(lambda: "objects in" in page.text(STATUS))
    assert len(page.all(".over .found")) > 0
    press(page, "Boxes to masks")
    page.wait(lambda: page.all(".objects input"))
    names = {one.get_attribute("value") for one in page.all(".objects input")}
    assert names <= {"disc", "box"}
    page.size(360, 740)
    assert page.overflow() == []


def test_without_models_the_room_offers_to_train_them(chrome, tmp_path):
    with studio_in(tmp_path) as url, watched(chrome, url) as page:
        page.open("#/vision")
        assert len(page.all(".offer")) == 2
        assert "volvelle train promptable" in page.text(".offer")
        assert not page.find("#segmenter").is_enabled()
