"""The page in a real browser: typing, streaming, stopping, loading again, a killed engine, keys, phones."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from started_server import StartedServer, kill_engine, started_server
from waiting import until

pytestmark = pytest.mark.slow

SCREENSHOTS = Path(__file__).parent / "screenshots"

ANSWER = "#messages li.assistant"
OpenPage = Callable[..., Any]


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def text_of(page: Any) -> str:
    return str(page.locator(f"{ANSWER} > .text").last.inner_text())


def wait_for_state(page: Any, state: str) -> None:
    page.locator(f"{ANSWER}[data-state={state}]").last.wait_for()


def set_number(page: Any, name: str, value: str) -> None:
    page.evaluate("document.getElementById('settings').open = true")
    page.fill(f"#{name}", value)
    page.press(f"#{name}", "Tab")


def grown(page: Any, beyond: int) -> None:
    """Wait until the answer is longer than that."""
    page.wait_for_function(
        "([where, most]) => (document.querySelector(where)?.textContent.length ?? 0) > most",
        arg=[f"{ANSWER}:last-child > .text", beyond],
    )


def long_answer(page: Any) -> None:
    """Settings under which an answer takes seconds: the same seed, and no end before 900 tokens are reached."""
    set_number(page, "seed", "7")
    set_number(page, "max_tokens", "900")
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=endless(route.request.post_data)))


def endless(body: str) -> str:
    """The request with no end before its longest: all of its tokens can be seen."""
    asked = json.loads(body)
    return json.dumps(asked | {"min_tokens": asked["max_tokens"]})


def test_an_answer_streams_and_is_measured(site: StartedServer, open_page: OpenPage) -> None:
    page = open_page(site.url)
    set_number(page, "temperature", "0")
    ask(page, "Tell me a tale.")
    page.locator("#stop").wait_for()
    wait_for_state(page, "done")
    whole = text_of(page)
    expected = httpx.post(
        site.url + "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Tell me a tale."}], "temperature": 0},
        timeout=60,
    ).json()["choices"][0]["message"]["content"]
    assert whole == expected.strip()
    note = page.locator(f"{ANSWER} .note").inner_text()
    assert "tokens/s" in note and "first after" in note
    assert page.locator("#send").is_visible() and not page.locator("#stop").is_visible()
    ask(page, "And another?")
    wait_for_state(page, "done")
    assert page.locator("#messages li").count() == 4


def test_stop_then_go_on(site: StartedServer, open_page: OpenPage) -> None:
    page = open_page(site.url)
    long_answer(page)
    ask(page, "Tell me a tale.")
    grown(page, 40)
    page.keyboard.press("Escape")
    wait_for_state(page, "stopped")
    before = text_of(page)
    until(lambda: not httpx.get(site.url + "/load", timeout=60).json()["server_load"])  # for nobody listens
    set_number(page, "max_tokens", "30")
    page.get_by_role("button", name="Go on").click()
    grown(page, len(before) + 20)
    wait_for_state(page, "stopped")  # at its longest
    assert text_of(page).startswith(before[:-5])
    page.get_by_role("button", name="Retry").click()
    wait_for_state(page, "stopped")
    assert page.locator(ANSWER).count() == 1


def test_loading_again_in_the_middle_of_an_answer(site: StartedServer, open_page: OpenPage) -> None:
    page = open_page(site.url)
    long_answer(page)
    ask(page, "Tell me a tale.")
    grown(page, 40)
    page.reload()
    wait_for_state(page, "stopped")
    assert len(text_of(page)) > 20 and page.input_value("#seed") == "7"
    before = len(text_of(page))
    set_number(page, "max_tokens", "30")
    page.get_by_role("button", name="Go on").click()
    grown(page, before + 20)
    wait_for_state(page, "stopped")
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#messages li").count() == 0


def test_the_engine_is_killed_in_the_middle_of_an_answer(site: StartedServer, open_page: OpenPage) -> None:
    page = open_page(site.url)
    long_answer(page)
    set_number(page, "max_tokens", "300")
    ask(page, "Tell me a tale.")
    grown(page, 40)
    kill_engine(site.process.pid)
    wait_for_state(page, "stopped")  # at its longest, as without the death
    broken = text_of(page)
    body = {
        "messages": [{"role": "user", "content": "Tell me a tale."}],
        "max_tokens": 300,
        "seed": 7,
        "min_tokens": 300,
    }
    found = httpx.post(site.url + "/v1/chat/completions", json=body, timeout=60).json()
    assert broken == found["choices"][0]["message"]["content"].strip()
    page.wait_for_function("() => document.getElementById('state').textContent.includes('restarted')")


@contextmanager
def at_work(site: StartedServer) -> Iterator[None]:
    """The server has something to do for as long as the block runs, however quick it is."""
    over = threading.Event()
    messages = [{"role": "user", "content": "Tell me a tale."}]

    def ask_on() -> None:
        while not over.is_set():
            body = {"messages": messages, "n": 2, "max_tokens": 900, "min_tokens": 900, "stream": True}
            with httpx.stream("POST", site.url + "/v1/chat/completions", json=body, timeout=60) as response:
                for _ in response.iter_lines():
                    if over.is_set():
                        return

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def shows_an_owner(live: dict[str, Any]) -> bool:
    marks = {mark for mark, _ in live["groups"][0]["runs"]}
    return live["first_owner"] in marks and live["requests"][0]["id"].startswith("chatcmpl-")


def test_the_picture_shows_the_pages_of_running_requests(site: StartedServer, open_page: OpenPage) -> None:
    page = open_page(site.url)
    page.wait_for_function("() => document.getElementById('roofline-text').textContent.includes('GB/s')")
    with at_work(site):
        page.locator("#requests td", has_text="running").first.wait_for()
        page.wait_for_function(
            "() => /[1-9][0-9]* of one request/.test(document.getElementById('page-text').textContent)"
        )
        page.wait_for_function("() => document.querySelectorAll('#roofline .now').length === 1")
        until(lambda: shows_an_owner(httpx.get(site.url + "/v1/live", timeout=60).json()))
        page.screenshot(path=SCREENSHOTS / "at-work.png", full_page=True)
    page.wait_for_function("() => / 0 of one request/.test(document.getElementById('page-text').textContent)")
    assert "cached" in page.inner_text("#page-text")


def test_a_server_with_a_key(open_page: OpenPage) -> None:
    with started_server("--api-key", "open-sesame", rows=4, cache_mib=16, threads=1) as site:
        page = open_page(site.url)
        page.locator("#key-dialog").wait_for()
        page.fill("#key", "wrong")
        page.get_by_role("button", name="Go on").click()
        page.get_by_text("The key was not accepted.").wait_for()
        page.fill("#key", "open-sesame")
        page.get_by_role("button", name="Go on").click()
        page.locator("#state[data-state=ready]").wait_for()
        set_number(page, "max_tokens", "20")
        ask(page, "Tell me a tale.")
        wait_for_state(page, "stopped")
        assert httpx.get(site.url + "/v1/live", timeout=60).status_code == 401
        policy = httpx.get(site.url + "/", timeout=60).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_phone_in_the_dark(site: StartedServer, open_page: OpenPage) -> None:
    page = open_page(site.url, viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True)
    set_number(page, "max_tokens", "30")
    ask(page, "Tell me a tale.")
    wait_for_state(page, "stopped")
    assert not page.locator("#engine").is_visible()
    page.get_by_role("tab", name="Engine").click()
    assert page.locator("#pages canvas").is_visible() and not page.locator("#prompt").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 29)"
    page.get_by_role("button", name="Switch between dark and light").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 247)"


def test_markup_in_an_answer_stays_text(site: StartedServer, open_page: OpenPage) -> None:
    page = open_page(site.url)
    said = "<img src=x onerror=alert(1)> ```js\nlet a = '<b>';``` end"
    events = [
        f'data: {{"choices": [{{"delta": {{"content": {part!r}}}, "finish_reason": null}}]}}\n\n'.replace("'", '"')
        for part in ("<img src=x onerror=alert(1)> ", "```js\\nlet a = <b>;``` end")
    ]
    stop = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body="".join(events) + stop, content_type="text/event-stream"),
    )
    ask(page, "x")
    wait_for_state(page, "done")
    assert "<img" in said and page.locator(f"{ANSWER} img").count() == 0
    assert text_of(page).startswith("<img src=x") and "<b>" in page.locator(f"{ANSWER} pre").inner_text()
