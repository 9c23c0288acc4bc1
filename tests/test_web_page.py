"""The web page in a real Chromium: against scripted answers, and against the demo model.

Everything the page says is found by role and name, as a screen reader would find it.
"""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed; see `make install`")

from conftest import find_browser
from fake_model_server import FakeModel, serving
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

pytestmark = pytest.mark.browser
expect.set_options(timeout=20_000)  # a busy machine is slow, not wrong

PHONE: dict[str, Any] = {
    "viewport": {"width": 375, "height": 740}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2,
}  # fmt: skip
# A refused request, or one that a test cuts off, is an error in the console whatever the page does about it.
REFUSED = (
    "Failed to load resource: the server responded with a status of 4",
    "Failed to load resource: net::ERR_FAILED",
)

# Of the focused element: what it is called ("" where nothing is focused), and how that is shown.
FOCUSED = """(() => {
    const e = document.activeElement;
    return e === document.body ? "" : e.getAttribute("aria-label") || e.innerText || e.id;
})()"""
FOCUS_RING = """(() => {
    const e = document.activeElement;
    return getComputedStyle(e).outlineStyle + getComputedStyle(e.parentElement).boxShadow;
})()"""
HANDLERS = """(root) => [...root.querySelectorAll("*")]
    .flatMap((e) => e.getAttributeNames()).filter((name) => name.startsWith("on"))"""
TOO_WIDE = """[...document.querySelectorAll("main, main > *")]
    .filter((e) => e.scrollWidth > e.clientWidth + 1 && !e.matches(".unseen, .keys")).map((e) => e.id)"""
MOVING = """[...document.querySelectorAll("*")]
    .filter((e) => getComputedStyle(e).animationName !== "none").length"""

# An answer that does not end when it is told to; each piece comes later than a conversation is saved again.
DEAF_STREAM = """() => {
    const now = performance.now.bind(performance);
    let late = 0, control;
    performance.now = () => now() + late;
    const body = new ReadableStream({ start: (controller) => { control = controller; } });
    const real = window.fetch.bind(window);
    window.fetch = async (path, options) =>
      options.method === "POST" ? new Response(body) : real(path, options);
    window.push = async (content) => {
      late += 5000;
      const chunk = JSON.stringify({ choices: [{ delta: { content } }] });
      control.enqueue(new TextEncoder().encode(`data: ${chunk}\\n\\n`));
      await new Promise((done) => setTimeout(done, 50));
    };
}"""

NewPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        args = ["--disable-dev-shm-usage", *(["--no-sandbox"] if root else [])]  # a container's is small
        browser = playwright.chromium.launch(executable_path=find_browser(), args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeModel, str]]:
    fake = FakeModel()
    with serving(fake.app) as url:
        yield fake, url


@pytest.fixture
def fake(served: tuple[FakeModel, str]) -> FakeModel:
    fake, _ = served
    fake.requests.clear()
    fake.cancelled.clear()
    fake.pieces = 0
    return fake


@pytest.fixture
def new_page(browser: Browser) -> Iterator[NewPage]:
    """Opens pages in browsers that have seen nothing; afterwards no page may have asked anybody else for
    anything, nor have logged an error."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_page(url: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)

        def only_ours(route: Any) -> None:
            if route.request.url.startswith((url, "data:", "blob:")):
                route.continue_()
            else:
                wrong.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", only_ours)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type in ("error", "warning") and wrong.append(line.text))
        page.goto(url)
        expect(page.get_by_label("Message", exact=True)).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in wrong if not line.startswith(REFUSED)] == []


@pytest.fixture
def page(fake: FakeModel, served: tuple[FakeModel, str], new_page: NewPage) -> Page:
    return new_page(served[1])


def ask(page: Page, text: str) -> Locator:
    """Send a message; returns the newest answer."""
    box = page.get_by_label("Message", exact=True)
    box.fill(text)
    box.press("Enter")
    expect(box).to_have_value("")
    return page.locator("article.answer").last


def finished(answer: Locator) -> Locator:
    expect(answer.get_by_role("button", name="Regenerate")).to_be_visible()
    return answer


def set_up(page: Page, **fields: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for label, value in fields.items():
        page.get_by_role("dialog").get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name="Done").click()


def pixels(page: Page, canvas: str) -> str:
    return str(page.evaluate("id => document.getElementById(id).toDataURL()", canvas))


def test_an_answer_streams_and_becomes_formatted_text(page: Page, fake: FakeModel) -> None:
    answer = finished(ask(page, "hello"))
    expect(answer.get_by_role("heading", name="A title")).to_be_visible()
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.get_by_role("listitem")).to_have_text(["one", "two"])
    expect(answer.get_by_role("cell", name="2 GB/s")).to_be_visible()
    expect(answer.get_by_role("link", name="link")).to_have_attribute("rel", re.compile("noopener"))
    expect(answer.locator(".code-head")).to_contain_text("python")
    expect(answer).to_contain_text("12 of 20 prompt tokens reused")
    sent = fake.requests[-1]
    assert sent["stream"] and sent["stream_options"] == {"include_usage": True}
    assert sent["messages"] == [{"role": "user", "content": "hello"}]


def test_an_answer_is_shown_before_it_is_over(page: Page) -> None:
    answer = ask(page, "slow")
    expect(answer).to_contain_text("word3")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    expect(answer.get_by_role("button", name="Regenerate")).to_be_hidden()


def test_finished_blocks_are_not_drawn_again(page: Page) -> None:
    """Or a selection would be lost with each token, and a long answer would cost its square."""
    page.evaluate(
        """() => new MutationObserver((changes) => {
            for (const { removedNodes } of changes)
              for (const node of removedNodes) if (node.textContent === "A title") window.drawnAgain = true;
        }).observe(document.getElementById("turns"), { childList: true, subtree: true })"""
    )
    finished(ask(page, "hello"))
    assert page.evaluate("window.drawnAgain") is None


def test_code_is_copied_by_its_button(page: Page) -> None:
    answer = finished(ask(page, "hello"))
    answer.locator(".code").get_by_role("button", name="Copy").click()
    expect(answer.locator(".code")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "def hit(expert):\n    return expert in slots"


def test_what_a_hostile_model_writes_does_no_harm(page: Page) -> None:
    answer = finished(ask(page, "hostile"))
    expect(answer).to_contain_text("The end.")
    expect(answer).to_contain_text("<script>window.harmed = 1</script>")  # as text
    hover = "links => links.forEach((link) => link.dispatchEvent(new Event('mouseover')))"
    answer.locator("a").evaluate_all(hover)
    assert page.evaluate("window.harmed") is None
    assert answer.locator("script, img, iframe, style, form, input, svg, object, [id], [style]").count() == 0
    assert answer.evaluate(HANDLERS) == []
    links = answer.locator("a[href]").evaluate_all("links => links.map((link) => link.protocol)")
    assert set(links) == {"https:"}


def test_stop_ends_the_answer_here_and_at_the_server(page: Page, fake: FakeModel) -> None:
    answer = ask(page, "slow and stopped")
    expect(answer).to_contain_text("word3")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(finished(answer)).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.wait_for_function("async () => (await (await fetch('v1/stats')).json()).requests.running === 0")
    assert "slow and stopped" in fake.cancelled
    ask(page, "hello again")
    expect(page.locator("article.answer")).to_have_count(2)
    finished(page.locator("article.answer").last)
    said = fake.requests[-1]["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert said[1]["content"].startswith("word0")  # what had come is part of the conversation


def test_a_question_stopped_before_its_answer_is_sent_with_the_next(page: Page, fake: FakeModel) -> None:
    """Two questions in a row are an error to templates that want every question answered."""
    ask(page, "hello silent")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("article.answer")).to_contain_text("stopped")
    finished(ask(page, "again"))
    assert fake.requests[-1]["messages"] == [{"role": "user", "content": "hello silent\n\nagain"}]


def test_regenerate_asks_the_same_again_and_replaces_the_answer(page: Page, fake: FakeModel) -> None:
    expect(finished(ask(page, "hello"))).to_contain_text("Answer number 1.")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("article.answer")).to_contain_text("Answer number 2.")
    expect(page.locator("article.answer")).to_have_count(1)
    assert fake.requests[0]["messages"] == fake.requests[1]["messages"]


def test_conversations_outlive_a_reload_and_can_be_switched_named_and_deleted(page: Page) -> None:
    finished(ask(page, "first question"))
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    finished(ask(page, "second question"))
    page.reload()
    expect(page.locator("article.user")).to_have_text(re.compile("second question"))
    expect(page.locator("article.answer").get_by_role("heading", name="A title")).to_be_visible()

    page.get_by_role("button", name="first question", exact=True).click()
    expect(page.locator("article.user")).to_have_text(re.compile("first question"))
    page.get_by_role("button", name="Rename first question").click()
    page.get_by_label("Name of the conversation").fill("Caches")
    page.get_by_label("Name of the conversation").press("Enter")
    page.reload()
    expect(page.get_by_role("button", name="Caches", exact=True)).to_have_attribute("aria-current", "true")

    page.get_by_role("button", name="Caches", exact=True).hover()
    page.get_by_role("button", name="Delete Caches").click()
    expect(page.get_by_role("button", name="Caches", exact=True)).to_have_count(0)
    expect(page.locator("article.user")).to_have_text(re.compile("second question"))
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article.user")).to_have_text(re.compile("first question"))
    page.reload()
    expect(page.get_by_role("button", name="Caches", exact=True)).to_be_visible()


def test_a_reload_in_the_middle_keeps_what_had_come(page: Page) -> None:
    expect(ask(page, "slow")).to_contain_text("word90")  # beyond the second after which it is kept
    page.reload()
    expect(finished(page.locator("article.answer"))).to_contain_text("word9")
    expect(page.locator("article.answer")).to_contain_text("stopped")


def test_what_still_comes_for_a_deleted_conversation_does_not_bring_it_back(page: Page) -> None:
    """Pieces that were under way once had it saved again."""
    page.evaluate(DEAF_STREAM)
    ask(page, "hello")
    page.evaluate("window.push('one')")
    expect(page.locator("article.answer")).to_contain_text("one")
    page.get_by_role("button", name="hello", exact=True).hover()
    page.get_by_role("button", name="Delete hello").click()
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    page.evaluate("window.push('two')")
    page.reload()
    expect(page.get_by_role("button", name="New conversation")).to_be_visible()
    expect(page.get_by_role("button", name="hello", exact=True)).to_have_count(0)


def test_nothing_can_be_sent_before_the_page_listens(served: tuple[FakeModel, str], browser: Browser) -> None:
    """Enter pressed too early was a line break, and Send left the page."""
    context = browser.new_context()
    page = context.new_page()
    held: list[Any] = []
    page.route("**/assets/app.js", lambda route: held.append(route))
    page.goto(served[1], wait_until="commit")
    expect(page.get_by_label("Message", exact=True)).to_be_disabled()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.wait_for_function("document.readyState !== 'loading'")
    held[0].continue_()
    finished(ask(page, "hello"))
    context.close()


def test_two_tabs_show_and_keep_the_same_conversation(page: Page, fake: FakeModel) -> None:
    """Each once overwrote what the other had added."""
    finished(ask(page, "first"))
    other = page.context.new_page()
    other.goto(page.url)
    finished(ask(page, "second"))
    page.locator("article.answer").nth(1).wait_for()
    expect(other.locator("article.answer")).to_have_count(2)
    finished(other.locator("article.answer").last)
    ask(other, "third")
    asked = [re.compile(word) for word in ("first", "second", "third")]
    expect(page.locator("article.user")).to_have_text(asked)
    finished(page.locator("article.answer").nth(2))
    said = [message["content"] for message in fake.requests[-1]["messages"] if message["role"] == "user"]
    assert said == ["first", "second", "third"]
    other.get_by_role("button", name="first", exact=True).hover()
    other.get_by_role("button", name="Delete first").click()
    expect(page.locator("article")).to_have_count(0)


def test_a_conversation_that_another_tab_has_answered_waits_until_that_is_over(page: Page) -> None:
    expect(ask(page, "slow")).to_contain_text("word3")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator("article.answer.running")).to_have_count(1)
    other.get_by_label("Message", exact=True).fill("hello")
    other.get_by_role("button", name="Send").click()
    expect(other.locator("#notice")).to_contain_text("Another tab has an answer")
    page.close()  # with it goes its answer
    finished(other.locator("article.answer"))
    other.get_by_role("button", name="Send").click()
    finished(other.locator("article.answer").nth(1))


def test_two_conversations_are_answered_at_once(page: Page, fake: FakeModel) -> None:
    expect(ask(page, "slow one")).to_contain_text("word3")
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(ask(page, "slow two")).to_contain_text("word3")
    expect(page.get_by_title("being answered")).to_have_count(2)
    assert fake.running >= 2
    page.keyboard.press("Escape")
    finished(page.locator("article.answer"))
    page.get_by_role("button", name="slow one", exact=True).click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()


def test_the_cache_is_seen_at_work(page: Page) -> None:
    expect(page.locator("#residency-summary")).to_contain_text("240 of 384 experts")
    before = pixels(page, "heat-map"), pixels(page, "recent-chart"), page.locator("#totals").inner_text()
    expect(ask(page, "slow")).to_contain_text("word30")
    expect(page.locator("#residency-summary")).to_contain_text(re.compile(r"\d+ came and \d+ left"))
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#tokens-per-s")).to_have_text("24.5")
    expect(page.locator("#hit-rate")).to_have_text("83 %")
    expect(page.get_by_role("meter", name="Drive, beside its peak")).to_have_attribute("aria-valuenow", "740")
    expect(page.get_by_role("meter", name="RAM, beside the budget")).to_have_attribute(
        "aria-valuetext", "600 MiB of 712 MiB"
    )
    after = pixels(page, "heat-map"), pixels(page, "recent-chart"), page.locator("#totals").inner_text()
    assert all(a != b for a, b in zip(before, after, strict=True))
    page.keyboard.press("Escape")
    expect(page.locator("#running")).to_have_text("0")


def test_the_heat_map_can_be_read_as_a_table(page: Page) -> None:
    page.get_by_text("By layer, as a table").click()
    rows = page.locator("#residency-rows tr")
    expect(rows).to_have_count(12)
    expect(rows.first).to_have_text(re.compile("0.*20 of 32.*63 %"))
    expect(page.get_by_role("img", name="12 layers of 32 experts: 240 of 384")).to_be_visible()


@pytest.mark.parametrize(
    "word, title, advice, button",
    [
        ("busy", "The server has as many requests as it takes", "Try again in 7 s.", "Try again"),
        ("full", "The conversation no longer fits", "longer than the context of 8192", "New conversation"),
        ("broken", "The answer broke off", "whether the server still runs", "Try again"),
        ("failing", "The server could not answer", "The drive gave 3 of 4096 bytes.", "Try again"),
    ],
)
def test_what_went_wrong_is_told_with_the_next_step(
    page: Page, word: str, title: str, advice: str, button: str
) -> None:
    ask(page, word)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(title)
    expect(alert).to_contain_text(advice)
    alert.get_by_role("button", name=button).click()
    if button == "New conversation":
        expect(page.locator("article")).to_have_count(0)
    else:
        expect(page.locator("article.answer")).to_have_count(1)
        expect(page.get_by_role("alert")).to_contain_text(title)


def test_a_server_that_is_gone_is_told_and_the_page_recovers(new_page: NewPage) -> None:
    with serving(FakeModel().app) as url:
        page = new_page(url)
        finished(ask(page, "hello"))
        page.context.route("**/v1/**", lambda route: route.abort())
        ask(page, "hello once more")
        expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
        expect(page.locator("#connection")).to_have_text("The server cannot be reached")
        page.context.unroute("**/v1/**")
        page.get_by_role("alert").get_by_role("button", name="Try again").click()
        expect(page.locator("article.answer").last).to_contain_text("Answer number 2.")
        expect(page.locator("#connection")).to_have_text("")


def test_a_key_is_asked_for_and_kept_for_this_tab_only(new_page: NewPage) -> None:
    with serving(FakeModel(api_key="s3cret").app) as url:
        page = new_page(url)
        ask(page, "hello")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("This server wants an API key")
        alert.get_by_role("button", name="Enter the key").click()
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("s3cret")
        page.get_by_label("API key").press("Enter")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator("article.answer")).to_contain_text("Answer number 1.")
        expect(page.locator("#model")).to_have_text("fake-moe")
        page.reload()
        finished(ask(page, "hello"))
        expect(page.get_by_role("alert")).to_have_count(0)
        assert page.evaluate("JSON.stringify(localStorage)").count("s3cret") == 0


def test_settings_go_into_the_request_and_outlive_a_reload(page: Page, fake: FakeModel) -> None:
    set_up(page, System_prompt="Be terse.", Temperature="0.5", Most_tokens="30", Seed="7")
    page.reload()
    finished(ask(page, "hello"))
    sent = fake.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be terse."}
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0.5, 30, 7)
    assert "top_p" not in sent  # the model's own


def test_impossible_settings_are_refused_where_they_are_entered(page: Page, fake: FakeModel) -> None:
    set_up(page, Temperature="9")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    finished(ask(page, "hello"))
    assert "temperature" not in fake.requests[-1]


def test_all_can_be_done_by_keyboard(page: Page, fake: FakeModel) -> None:
    keyboard = page.keyboard
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    keyboard.type("slow")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    assert fake.requests == []
    keyboard.press("Enter")
    expect(page.locator("article.answer")).to_contain_text("word3")
    assert fake.requests[0]["messages"][0]["content"] == "slow\nsecond line"
    keyboard.press("Escape")
    finished(page.locator("article.answer"))
    page.reload()
    page.get_by_role("link", name="Skip to the message box").focus()
    reached = []
    while (keyboard.press("Tab"), name := page.evaluate(FOCUSED))[1]:
        reached.append(name)
        assert page.evaluate(FOCUS_RING) != "nonenone", f"no visible focus on {name}"
    tools = ("New conversation", "slow", "Rename slow", "Delete slow")
    for name in ("Settings", "Dark colours", *tools, "Regenerate", "Send", "By layer, as a table"):
        assert name in reached, f"{name} is not reached: {reached}"
    assert reached.index("New conversation") < reached.index("Regenerate") < reached.index("Send")


def test_the_skip_link_leads_to_the_message_box(page: Page) -> None:
    assert page.evaluate("document.querySelector('a, button, input').className") == "skip"  # Tab's first stop
    page.get_by_role("link", name="Skip to the message box").focus()
    expect(page.get_by_role("link", name="Skip to the message box")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_answers_are_announced_by_the_block_and_not_by_the_token(page: Page) -> None:
    page.evaluate(
        """() => {
            window.told = [];
            new MutationObserver((changes) => {
              for (const change of changes)
                for (const node of change.addedNodes) window.told.push(node.textContent);
            }).observe(document.getElementById("announcer"), { childList: true });
        }"""
    )
    finished(ask(page, "hello"))
    told = page.evaluate("window.told")
    assert told[0] == "A title" and told[-1] == "Answer number 1."
    assert len(told) == 7  # title, text, list, table, code, two paragraphs
    expect(ask(page, "slow")).to_contain_text("word30")
    assert len(page.evaluate("window.told")) == 7
    page.keyboard.press("Escape")
    finished(page.locator("article.answer").last)
    assert "word30" in page.evaluate("window.told")[7]


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    served: tuple[FakeModel, str], fake: FakeModel, new_page: NewPage
) -> None:
    page = new_page(served[1], **PHONE)
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    finished(ask(page, "wide"))
    assert page.evaluate(sideways) == 0 and page.evaluate(TOO_WIDE) == []
    expect(page.get_by_role("complementary")).to_be_hidden()
    page.locator("#figures-strip").click()
    expect(page.get_by_role("complementary", name="Cache at work")).to_be_visible()
    expect(page.locator("#heat-map")).to_be_in_viewport()
    assert page.evaluate(sideways) == 0
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New conversation")).to_be_in_viewport()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()


def test_the_newest_line_is_followed_unless_the_reader_has_gone_up(page: Page) -> None:
    finished(ask(page, "long"))
    expect(page.locator("article.answer").get_by_text("Paragraph 59")).to_be_in_viewport()
    page.locator("#transcript").evaluate("(e) => (e.scrollTop = 0)")
    page.get_by_role("button", name="To the newest").click()
    expect(page.locator("article.answer").get_by_text("Paragraph 59")).to_be_in_viewport()
    expect(page.get_by_role("button", name="To the newest")).to_be_hidden()


def test_dark_and_light_follow_the_system_until_the_button_says_otherwise(
    served: tuple[FakeModel, str], new_page: NewPage
) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = new_page(served[1], color_scheme="light"), new_page(served[1], color_scheme="dark")
    assert light.evaluate(paper) != dark.evaluate(paper)
    maps = pixels(light, "heat-map"), pixels(dark, "heat-map")
    assert maps[0] != maps[1]
    button = dark.get_by_role("button", name="Dark colours")
    expect(button).to_have_attribute("aria-pressed", "true")
    button.click()
    assert dark.evaluate(paper) == light.evaluate(paper)
    dark.reload()
    expect(button).to_have_attribute("aria-pressed", "false")
    assert dark.evaluate(paper) == light.evaluate(paper)


def test_nothing_moves_for_those_who_want_it_still(served: tuple[FakeModel, str], new_page: NewPage) -> None:
    page = new_page(served[1], reduced_motion="reduce")
    expect(ask(page, "slow")).to_contain_text("word3")
    assert page.evaluate(MOVING) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_to_complain_about(
    served: tuple[FakeModel, str], fake: FakeModel, new_page: NewPage, scheme: str, options: dict[str, Any]
) -> None:
    """WCAG 2.2 A and AA, as far as a program can tell: contrast, names, roles, order."""
    import axe_playwright_python

    # Outside of the page's security policy, as a browser's own tools are.
    page = new_page(served[1], color_scheme=scheme, bypass_csp=True, **options)
    finished(ask(page, "hello"))
    ask(page, "busy")
    expect(page.get_by_role("alert")).to_be_visible()
    page.evaluate(Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text("utf-8"))
    assert complaints(page) == []
    page.get_by_role("button", name="Settings").click()
    assert complaints(page) == []
    page.keyboard.press("Escape")
    if options:
        page.locator("#figures-strip").click()
        expect(page.get_by_role("complementary")).to_be_visible()
        assert complaints(page) == []


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    """`flashmoe serve` with the demo model in less memory than its weights."""
    command = [sys.executable, "-m", "flashmoe", "serve", "--ram-budget", "712M", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if match := re.search(r"http://\S+:\d+/", line):
                break
        else:
            pytest.fail("".join(said))
        reading = threading.Thread(target=lambda: said.extend(process.stderr or []))
        reading.start()
        yield match[0]
        process.terminate()
        process.wait(60)
        reading.join(10)


@pytest.mark.demo
def test_the_demo_model_answers_and_its_cache_is_seen_at_work(demo_url: str, new_page: NewPage) -> None:
    page = new_page(demo_url, viewport={"width": 1360, "height": 860})
    expect(page.locator("#model")).to_have_text("smolmoe")
    expect(page.locator("#residency-summary")).to_contain_text("0 of 1,440 experts")
    before = pixels(page, "heat-map")
    set_up(page, Temperature="0", Most_tokens="120")
    answer = ask(page, "What is the capital of France?")
    expect(answer).to_contain_text("Paris", timeout=120_000)
    expect(page.locator("#residency-summary")).to_contain_text(re.compile(r"[1-9]\d\d of 1,440 experts"))
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)
    expect(answer).to_contain_text("tokens/s")
    assert pixels(page, "heat-map") != before
    ram = page.get_by_role("meter", name="RAM, beside the budget")
    used, budget = (int(ram.get_attribute(name) or 0) for name in ("aria-valuenow", "aria-valuemax"))
    assert 0 < used <= budget == 712 << 20
    again = ask(page, "And of Italy?")
    expect(again).to_contain_text(re.compile(r"\d+ of \d+ prompt tokens reused"), timeout=120_000)


@pytest.mark.demo
@pytest.mark.skipif("FLASHMOE_SCREENSHOTS" not in os.environ, reason="`make screenshots` makes them")
@pytest.mark.parametrize("name", ["desktop", "dark", "phone", "phone-cache"])
def test_the_documents_pictures_are_of_the_demo_model(name: str, demo_url: str, new_page: NewPage) -> None:
    scheme = "dark" if name == "dark" else "light"
    desktop = {"viewport": {"width": 1360, "height": 890}, "color_scheme": scheme}
    page = new_page(demo_url, **(PHONE if name.startswith("phone") else desktop))
    set_up(page, Temperature="0")
    answer = ask(page, "Write a Python function that adds two numbers.")
    expect(answer).to_contain_text("However", timeout=120_000)
    if name == "phone-cache":
        page.locator("#figures-strip").click()
        expect(page.locator("#recent-chart")).to_be_in_viewport()
    page.screenshot(path=Path(os.environ["FLASHMOE_SCREENSHOTS"], f"web-{name}.png"))


def complaints(page: Page) -> list[str]:
    # Not the order of headings: that is the model's.
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    options = {"runOnly": tags, "rules": {"heading-order": {"enabled": False}}}
    found = page.evaluate("(options) => axe.run(options)", options)
    return [
        f"{violation['id']}: {node['html']} ({node['failureSummary']})"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
