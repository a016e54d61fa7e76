"""The studio in a real browser, by clicks and by keys: the shell, the catalogue, a technique, Claims and Runs."""

from __future__ import annotations

import pytest
from tests.serve.studio.browser import Page

from volvelle.claims.run import run_claim
from volvelle.runs import RunFolder

pytestmark = pytest.mark.browser

ROOMS = ("#/", "#/technique/rope", "#/technique/position.alibi", "#/runs", "#/runs/base", "#/claims")


@pytest.fixture(scope="module", autouse=True)
def measured(place):
    """A claim that was measured in the studio's folder."""
    return run_claim("precision", "quick", place / "runs" / "claims")


def cards(page: Page) -> list[str]:
    return [one.text for one in page.all(".card h3")]


def test_the_catalogue_searches_filters_and_turns_its_pages(page):
    page.open("#/")
    assert len(page.all(".wheel .sector")) == len(page.all("#family option")) - 1
    first = cards(page)
    assert len(first) == 12
    page.click(".pages button:last-child")
    page.wait(lambda: cards(page) != first)
    assert "page=2" in page.run("return location.hash")
    page.click("#search")
    page.press(*"rotary")
    page.wait(lambda: any("RoPE" in one for one in cards(page)))
    assert "q=rotary" in page.run("return location.hash")
    page.run("arguments[0].select()", page.find("#search"))
    page.press(*"旋转")
    page.wait(lambda: any("RoPE" in one for one in cards(page)))
    page.run("arguments[0].select()", page.find("#search"))
    page.press(*"no such words")
    page.wait(lambda: not cards(page))
    page.click(".cards .empty button")
    page.choose("#family", "position")
    page.wait(lambda: {one.text.split("\n")[0] for one in page.all(".card .top-line")} == {"position"})
    assert page.all(".wheel .sector.on")[0].get_attribute("data-family") == "position"


def test_the_wheel_chooses_a_family_and_the_address_keeps_the_state(page):
    page.open("#/")
    page.run("document.querySelector('.sector[data-family=decode]').dispatchEvent(new MouseEvent('click'))")
    page.wait(lambda: "family=decode" in page.run("return location.hash"))
    found = cards(page)
    page.driver.refresh()
    page.settle()
    assert cards(page) == found
    page.driver.back()
    page.settle()
    page.wait(lambda: cards(page) != found)


def test_a_technique_shows_formula_code_and_verdict(page):
    page.open("#/")
    page.click("#search")
    page.press(*"roformer")
    page.wait(lambda: any("RoPE" in one for one in cards(page)))
    page.click(".card h3 a[href='#/technique/rope']")
    page.wait(lambda: page.text("h1").startswith("RoPE"))
    assert "cos mθ_i" in page.text(".equation")
    assert page.driver.title.startswith("RoPE")
    page.wait(lambda: "class RotaryEmbedding" in page.text(".code"))
    assert [one.text for one in page.all(".code .d") if one.text == "apply_rope"]
    page.click("[role=tab][data-file='parts/attention/linear.py']")
    page.wait(lambda: "Katharopoulos" in page.text(".code"))
    assert page.find("[role=tab][data-file='parts/attention/linear.py']").get_attribute("aria-selected") == "true"
    page.open("#/technique/precision")
    assert page.text(".verdict") == "held"
    assert "measured in this folder" in page.text("main")


def test_keys_alone_lead_from_the_page_to_a_technique(page):
    from selenium.webdriver.common.keys import Keys

    page.open("#/")
    page.press(Keys.TAB)
    assert page.focused().text == "Skip to content"
    page.press(Keys.ENTER)
    page.wait(lambda: page.focused().tag_name == "main")
    for _ in range(40):
        page.press(Keys.TAB)
        if page.run("return !!document.activeElement.closest('.card h3')"):
            break
    wanted = page.focused().text
    outline = page.run("return getComputedStyle(document.activeElement, '::after').outlineStyle")
    assert outline == "solid"
    page.press(Keys.ENTER)
    page.wait(lambda: page.text("h1") == wanted)
    assert page.focused().tag_name == "main"  # who reads by ear begins at the new room


def test_keys_keep_their_place_when_a_list_is_drawn_anew(page):
    from selenium.webdriver.common.keys import Keys

    for room in ("#/", "#/claims"):
        page.open(room)
        page.find("#search").click()
        while page.run("return !document.activeElement.closest('.chips')"):
            page.press(Keys.TAB)
        page.press(Keys.TAB, Keys.ENTER)
        page.wait(lambda: page.all(".chips button")[1].get_attribute("aria-pressed") == "true")
        assert page.focused() == page.all(".chips button")[1], room


def test_claims_are_searched_and_filtered(page):
    page.open("#/claims")
    everything = len(page.all(".claims tbody tr"))
    page.click("#search")
    page.press(*"rotary angles")
    page.wait(lambda: len(page.all(".claims tbody tr")) < everything)
    row = page.find("tr[data-claim=precision]")
    assert "held" in row.text
    assert "this machine" in row.text
    page.click(".chips button:nth-child(3)")
    page.wait(lambda: page.text(".claims tbody") == "No claim fits.")


@pytest.mark.slow
def test_a_claim_is_measured_from_its_button(page, place):
    page.open("#/claims?q=rope")
    assert "quick," not in page.text("tr[data-claim=rope]")
    page.click("tr[data-claim=rope] button[aria-label^='Measure rope, quick']")
    page.wait(lambda: page.all(".console"))
    page.wait(lambda: (place / "runs" / "claims" / "rope.json").is_file(), 300)
    page.wait(lambda: "quick," in (row := page.text("tr[data-claim=rope]")) and "this machine" in row, 60)
    page.click("tr[data-claim=rope] button[aria-label^='Measure rope, quick']")
    page.click(".job button")
    page.wait(lambda: "cancelled" in page.text("main"))


def test_a_run_shows_its_curves_and_its_report(page):
    page.open("#/runs")
    page.click(".runs a[href='#/runs/base']")
    page.wait(lambda: page.text("h1") == "base")
    page.wait(lambda: page.all(".chart .curve"))
    assert "loss" in page.text(".curves")
    page.click("details.panel summary")
    assert "model.width" in page.text("details.panel")
    page.driver.get(page.find("a[href$='/report']").get_attribute("href"))
    assert "base" in page.find("body").text


def test_a_run_that_is_being_written_grows(page, place):
    run = RunFolder.create("growing", root=place / "runs", kind="train-language", config={"steps": 3})
    run.log({"event": "train", "step": 1, "loss": 3.0})
    page.open("#/runs/growing")
    page.wait(lambda: "running" in page.text("[role=status]"))
    run.log({"event": "train", "step": 2, "loss": 2.5})
    run.log({"event": "train", "step": 3, "loss": 2.25})
    page.wait(lambda: page.run("return document.querySelector('.curve')?.getAttribute('d').split('L').length") == 3)
    run.update_manifest(status="finished")
    page.wait(lambda: "finished" in page.text("[role=status]"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_room_scrolls_sideways_on_a_phone(page, scheme):
    page.size(360, 780)
    page.scheme(scheme)
    for room in ROOMS:
        page.open(room)
        assert page.overflow() == [], room
        paper = page.run("return getComputedStyle(document.body).backgroundColor")
        assert (min(map(int, paper[4:-1].split(","))) > 200) == (scheme == "light"), paper


def test_the_button_of_colours_stands_above_the_system(page):
    page.scheme("light")
    page.open("#/claims")
    light = page.run("return getComputedStyle(document.body).backgroundColor")
    for _ in range(2):  # as the system, light, dark
        page.click("#scheme")
    assert "dark" in page.find("#scheme").get_attribute("aria-label")
    assert page.run("return getComputedStyle(document.body).backgroundColor") != light
    page.driver.refresh()
    page.settle()
    assert page.run("return document.documentElement.dataset.scheme") == "dark"
    page.click("#scheme")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == light


def test_a_room_that_is_not_there_says_so(page):
    page.open("#/nowhere")
    assert "nowhere" in page.text("[role=alert]")
    page.open("#/technique/nothing")
    assert "nothing" in page.text("[role=alert]")
    page.note()
    # The server's 404 is what this test is about; nothing else was complained of.
    assert all("404" in one for one in page.complaints)
    page.complaints.clear()


CONTRAST = """
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const colour = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (one) => {
  for (; one; one = one.parentElement) {
    const found = colour(getComputedStyle(one).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const faint = new Set();
for (const one of document.querySelectorAll("body *")) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || one.closest("svg, noscript, :disabled, .unseen") || !one.checkVisibility()) continue;
  const [a, b] = [colour(getComputedStyle(one).color), behind(one)].map(light).sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) faint.add(`${one.tagName}.${one.className} ${ratio.toFixed(2)}`);
}
return [...faint];
"""
"""Text whose contrast with what lies behind it is under 4.5, the level AA of WCAG 2.2 for text of this size."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page, scheme):
    page.scheme(scheme)
    for room in ROOMS:
        page.open(room)
        assert page.run(CONTRAST) == [], room
    faint = "Object.assign(document.createElement('p'), {textContent: 'x', style: 'color: #777'})"
    page.run(f"document.body.append({faint})")
    assert page.run(CONTRAST) != [], "the measure sees nothing"


def test_every_control_has_a_name(page):
    for room in ROOMS:
        page.open(room)
        nameless = page.run(
            """const named = (one) => one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length;
            return [...document.querySelectorAll("button, a, input, select, textarea")].filter((one) => !named(one))
              .map((one) => one.outerHTML)"""
        )
        assert nameless == [], room
        assert len(page.all("h1")) == 1, room
