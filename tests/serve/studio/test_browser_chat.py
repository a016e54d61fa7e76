"""Chat in a real browser: an answer, the race, keys, a phone's width, with a small trained model."""

from __future__ import annotations

import pytest
from tests.serve.studio.browser import studio_in, watched

from volvelle.hub.store import status

pytest.importorskip("selenium", reason="wants the extra dev")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.browser

STATUS = ".composer [role=status]"


@pytest.fixture
def chat(page):
    """The room, with the model open."""
    page.open("#/chat")
    page.click("#say")
    page.wait(lambda: "parameters" in page.text(STATUS))
    return page


def figures(page):
    """The lines below the answers, once none is being written."""
    page.wait(lambda: page.find(".composer .primary").is_enabled() and page.all(".lane"))
    return [one.text for one in page.all(".lane .meta")]


def test_an_answer_is_written_by_keys_alone(chat):
    chat.press(*"the cat sat")
    ActionChains(chat.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    chat.press(*"on the", Keys.ENTER)
    assert chat.text(".room-chat .said") == "the cat sat\non the"
    (line,) = figures(chat)
    assert "tokens in" in line
    assert "cut at the longest length" in line or "the model ended it" in line
    assert chat.run("return document.querySelectorAll('.tokens .token').length") > 0
    assert chat.run("return document.querySelector('#say').value") == ""
    assert float(chat.all(".meter output")[1].text) > 0


def test_the_race_writes_the_answer_twice_and_compares(chat):
    chat.press(*"the dog lay on the log. the dog lay")
    chat.click(".composer .bar button:nth-child(2)")
    chat.wait(lambda: chat.find(".verdict").text)
    assert "The answers are the same, token for token" in chat.text(".verdict")
    assert "tokens a step instead of 1" in chat.text(".verdict")
    assert [one.text for one in chat.all(".lane h3")] == ["without drafts", "with drafts: prompt lookup"]
    texts = chat.run("""return [...document.querySelectorAll('.tokens')].map((one) =>
        [...one.querySelectorAll('span.token')].map((token) => token.textContent).join(''))""")
    assert texts[0] == texts[1] != ""
    assert all(float(one.text) > 0 for one in chat.all(".meter output"))


def test_a_race_without_drafts_and_an_empty_message_do_nothing(chat):
    chat.choose("#way", "none")
    chat.click("#say")
    chat.press(*"the mat")
    chat.click(".composer .bar button:nth-child(2)")
    chat.wait(lambda: "Choose who drafts" in chat.text("#notices"))
    assert chat.run("return document.querySelector('#say').value") == "the mat"
    chat.run("document.querySelector('#say').value = '  '")
    chat.click(".composer .primary")
    assert not chat.all(".lane")


def test_a_seed_draws_the_same_answer_again(chat):
    chat.choose("#way", "none")
    chat.run("const heat = document.querySelector('#heat'); heat.value = 1.2; heat.dispatchEvent(new Event('input'))")
    assert chat.find("#seed").is_enabled()
    written = []
    for _ in range(2):
        chat.click(".composer .quiet")
        chat.click("#say")
        chat.press(*"the cat", Keys.ENTER)
        figures(chat)
        written.append(chat.text(".tokens"))
    assert written[0] == written[1]


def test_a_phone_shows_it_without_scrolling_sideways(chat):
    chat.press(*"the dog lay on the log. the dog lay", Keys.ENTER)
    figures(chat)
    for scheme in ("light", "dark"):
        chat.scheme(scheme)
        chat.size(360, 740)
        assert chat.overflow() == []


@pytest.mark.slow
def test_smollm2_keeps_drafts_and_writes_the_same(chrome, tmp_path):
    if status("smollm2").state != "ready":
        pytest.skip("smollm2 is not on this machine: volvelle get smollm2")
    with studio_in(tmp_path) as url, watched(chrome, url) as page:
        page.open("#/chat")
        page.click("#say")
        page.wait(lambda: "134.5M parameters" in page.text(STATUS), 300)
        page.press(*"Repeat this sentence three times: The old wheel turns and the stars turn with it.")
        page.click(".composer .bar button:nth-child(2)")
        page.wait(lambda: page.find(".verdict").text, 600)
        assert "The answers are the same, token for token" in page.text(".verdict")
        assert len(page.all(".token.kept")) > 5
