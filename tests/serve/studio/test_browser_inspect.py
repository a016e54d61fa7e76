"""Inspect in a real browser: fields under the pointer and by keys, curves, a ring that plays, a plan."""

from __future__ import annotations

import pytest

pytest.importorskip("selenium", reason="wants the extra dev")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.browser


def phone(page):
    """Nothing scrolls sideways at a phone's width, in light and in dark."""
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        page.size(360, 740)
        assert page.overflow() == []


def test_a_unit_shows_what_it_sees(page):
    page.open("#/inspect/field")
    page.choose(".instrument select", "resnet-18")
    page.wait(lambda: "resnet-18 at 224" in page.text(".instrument [role=status]"))
    rows = page.all(".tall tbody tr")
    assert rows[0].text.split()[0] == "conv1"
    page.run("arguments[0].querySelector('button').click()", rows[0])
    page.wait(lambda: "7 × 7 pixels, 2 pixels from one unit to the next" in page.text(".reading"))
    before = page.text(".reading")
    page.run("document.querySelector('.map').focus()")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    page.wait(lambda: "Unit in row 56, column 56" in page.text(".reading"))
    # 56 x 2 - 3 = 109: the field of conv1's unit 56 begins there.
    assert "sees rows 109 to 115 and columns 109 to 115" in page.text(".reading")
    ActionChains(page.driver).move_to_element_with_offset(page.find(".map"), 40, -40).perform()
    page.wait(lambda: page.text(".reading") not in (before, "") and "row 56" not in page.text(".reading"))
    phone(page)


def test_curves_follow_their_controls(page):
    page.open("#/inspect/positions")
    page.wait(lambda: len(page.all(".chart svg")) == 2)
    page.choose(".choices select", "yarn")
    page.wait(lambda: "trained length" in page.text(".charts"))
    page.click(".chips [data-kind=alibi]")
    page.wait(lambda: "slope 0.5" in page.text(".charts"))
    page.click(".chips [data-kind=t5]")
    page.wait(lambda: "one direction" in page.text(".charts"))
    phone(page)


def test_the_ring_runs_and_is_played_step_by_step(page):
    page.open("#/inspect/ring")
    page.click(".choices .primary")
    page.wait(lambda: "24 messages in 6 steps; every rank ended with the sum" in page.text(".choices [role=status]"))
    cells = [[cell.text for cell in row.find_elements("css selector", "td")] for row in page.all(".scroll tbody tr")]
    assert cells[:4] == [[str(rank), "98,304", "98,304"] for rank in range(4)]
    assert "as the formula says" in page.text(".instrument")
    page.wait(lambda: page.text(".player output") == "all 6 steps")
    back, play, step = page.all(".player button")
    back.click()
    page.wait(lambda: page.text(".player output") == "step 6 of 6")
    back.click()
    page.wait(lambda: page.text(".player output") == "step 5 of 6")
    assert len(page.all(".ring .parcel")) == 4
    step.click()
    step.click()
    page.wait(lambda: page.text(".player output") == "all 6 steps")
    play.click()
    page.wait(lambda: play.text == "Pause")
    play.click()
    page.wait(lambda: play.text == "Play")
    phone(page)


@pytest.mark.slow
def test_a_plan_follows_its_sliders(page):
    page.open("#/inspect/memory")
    page.wait(lambda: page.all(".stack"), 300)
    assert "fits: " in page.text(".plan")
    page.run("""const all = [...document.querySelectorAll('.choices input[type=range]')];
        all[0].value = 3; all[0].dispatchEvent(new Event('input'))""")
    page.wait(lambda: len(page.all(".former")) == 2, 300)
    totals = [float(one.text.split()[0]) for one in page.all(".former b")]
    assert totals[0] > totals[1]
    phone(page)
