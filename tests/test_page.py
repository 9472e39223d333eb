"""The web page in a real browser, against a server that says what each test wants it to say."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_ollama import CONTEXT, PAGE, Fake, Reply, serving
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ("--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update")
WAIT = 15_000  # milliseconds until a test gives up; what is waited for comes at once on an idle machine
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}

HOSTILE = (
    "<img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script></script>",
    "[here](javascript:window.hacked=1) [there](JaVaScRiPt:window.hacked=1) [data](data:text/html,<script>x</script>)",
    "[tab](java\tscript:window.hacked=1) [vb](vbscript:x) <javascript:window.hacked=1> [rel](/api/delete)",
    '[title](https://example.com/ "x\\" onmouseover=window.hacked=1")',
    '[quote](https://example.com/"onmouseover=window.hacked=1)',
    "![picture](https://example.com/track.png) ![inline](data:image/svg+xml,<svg onload=window.hacked=1>)",
    '```"><img src=x onerror=window.hacked=1>\n</code></pre><svg onload=window.hacked=1>\n```',
    '```js" onclick="window.hacked=1\nx\n```',
    "| <b onclick=window.hacked=1>a</b> | `</td><script>window.hacked=1</script>` |\n|---|---|\n| <iframe src=/> | b |",
    "# <svg/onload=window.hacked=1>\n> <style>*{display:none}</style>\n\n- <form action=/><button>x</button>",
    "&lt;img src=x onerror=window.hacked=1&gt; &#60;script&#62;",
)
DOCUMENTS = (
    "# One\n\ntext *a* and **b**\nnext line\n\n- a\n  - b\n    1. c\n- d\n\n> quote\n> - in it\n\n---\nend",
    "1. one\n\n2. two\n\n   ```py\n   x = 1\n\n   y = 2\n   ```\n3. three\n10. ten\nlazy\n\nafter",
    "| a | b |\n|:-:|--:|\n| 1 | `2` |\n| x \\| y |\n\n```js\nlet a = `b`;\n```\ntail ``a ` b`` https://example.com/a_(b).",
    "中文**加粗：**后面，*斜体*。\n- 项目\n* 另一个\n+ 第三个\n\n~~~\n~~~\n~~删除~~ snake_case_name __b__ ***both***",
    "unfinished **bold and `code and [link](https://exa",
    "a\r\nb\r\n\r\n```\r\nc\r\n```\r\nd",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH")
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*QUIET])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def fake_server() -> Iterator[Fake]:
    with serving() as fake:
        yield fake


@pytest.fixture
def fake(fake_server) -> Fake:
    fake_server.reset()
    return fake_server


class Visit:
    """A browser's profile with the page in it; `problems` is what the browser complained about."""

    def __init__(self, browser: Browser, fake: Fake, **options: Any) -> None:
        self.fake, self.problems = fake, []
        self.context: BrowserContext = browser.new_context(**{"locale": "en-US", **options})
        self.context.set_default_timeout(WAIT)

    def open(self, place: str = "") -> Page:
        page = self.context.new_page()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._request)
        page.goto(self.fake.address + place)
        return page

    def _console(self, message: ConsoleMessage) -> None:
        answered = "/api/" in message.location["url"] and message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not answered:
            self.problems.append(message.text)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.fake.address, "data:", "blob:")):
            self.problems.append(f"asked {request.url}")


@pytest.fixture
def visit(browser, fake, request) -> Iterator[Visit]:
    """Parametrize indirectly with options of the browser's profile."""
    visit = Visit(browser, fake, **getattr(request, "param", {}))
    yield visit
    visit.context.close()
    assert visit.problems == []


@pytest.fixture
def page(visit) -> Page:
    page = visit.open()
    expect(page.locator("#model")).not_to_have_value("")
    return page


def ask(page: Page, text: str) -> None:
    page.locator("#composer-text").fill(text)
    page.keyboard.press("Enter")


def asked(page: Page, text: str) -> Locator:
    """Asks, and waits for the end of the answer."""
    ask(page, text)
    expect(page.locator(".message-assistant").last).to_have_attribute("aria-busy", "false")
    return page.locator(".message-assistant").last


def answers(page: Page) -> Locator:
    return page.locator(".message-assistant .markdown")


def conversations(page: Page) -> Locator:
    return page.locator(".conversation-title")


def told(fake: Fake) -> list[tuple[str, str]]:
    """Messages of the latest question."""
    return [(message["role"], message["content"]) for message in fake.chats[-1]["messages"]]


def colour(page: Page, selector: str, name: str) -> str:
    return page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")


# --- asking and answering


def test_an_answer_is_shown_as_it_comes(page, fake):
    reply = fake.will_say("Hello", ", **wor", hold=True, counts=(40, 25))
    ask(page, "Hi there")
    expect(answers(page)).to_have_text("Hello, **wor")
    expect(page.locator(".phase")).to_contain_text("Writing")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    reply.go_on.set()
    expect(page.locator(".stats")).to_contain_text("10.0 tokens/s · 25 tokens · first token after")
    expect(page.locator("#meter")).to_have_text("65 / 2,048")
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    expect(page.locator("#announcer")).to_have_text("Answer: Hello, **wor")
    assert fake.chats == [
        {
            "model": "chatglm-6b:latest",
            "messages": [{"role": "user", "content": "Hi there"}],
            "options": {},
            "stream": True,
        }
    ]


def test_a_conversation_is_told_as_a_whole(page, fake):
    fake.will_say("First.")
    fake.will_say("Second.")
    asked(page, "one")
    asked(page, "two")
    assert told(fake) == [("user", "one"), ("assistant", "First."), ("user", "two")]
    expect(page.locator("#title")).to_have_text("one")
    assert page.title() == "one – glmexport"


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_answer_and_keeps_its_text(page, fake, way):
    reply = fake.will_say("Half of", " it", hold=True)
    ask(page, "Count")
    expect(answers(page)).to_have_text("Half of it")
    if way == "key":
        page.keyboard.press("Escape")
    else:
        page.locator("#send").click()
    expect(page.locator(".message-end")).to_have_text("Stopped")
    assert reply.gone.wait(WAIT / 1000)
    asked(page, "Go on")
    assert told(fake) == [("user", "Count"), ("assistant", "Half of it"), ("user", "Go on")]


def test_an_answer_goes_on_while_another_conversation_is_open(page, fake):
    reply = fake.will_say("Long", hold=True)
    ask(page, "first")
    expect(answers(page)).to_have_text("Long")
    page.keyboard.press("Control+k")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".writing-dot")).to_have_count(1)
    asked(page, "second")
    reply.go_on.set()
    expect(page.locator(".writing-dot")).to_have_count(0)
    expect(answers(page)).to_have_text("Hello.")
    page.get_by_role("button", name="first", exact=True).click()
    expect(answers(page)).to_have_text("Long")
    expect(page.locator(".stats")).to_be_visible()


def test_regenerate_asks_once_more_without_the_old_answer(page, fake):
    fake.will_say("Old.")
    fake.will_say("New.")
    asked(page, "Say something")
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text(["New."])
    expect(page.locator("#composer-text")).to_be_focused()
    assert told(fake) == [("user", "Say something")]


def test_an_edited_message_replaces_what_followed_it(page, fake):
    for text in ("A", "B", "C"):
        fake.will_say(text)
    asked(page, "one")
    asked(page, "two")
    first = page.locator(".message-user").first
    first.hover()
    first.get_by_role("button", name="Edit message").click()
    area = page.get_by_role("textbox", name="Edited message")
    expect(area).to_be_focused()
    area.fill("one, better")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(["C"])
    assert told(fake) == [("user", "one, better")]
    expect(page.locator(".message-user .plain")).to_have_text(["one, better"])


def test_an_edit_can_be_given_up(page, fake):
    asked(page, "one")
    page.locator("#composer-text").press("ArrowUp")
    page.get_by_role("textbox", name="Edited message").fill("something else")
    page.keyboard.press("Escape")
    expect(page.locator(".message-user .plain")).to_have_text(["one"])
    assert len(fake.chats) == 1


def test_an_answer_at_its_limit_says_so(page, fake):
    fake.will_say("cut off", done_reason="length")
    asked(page, "Go")
    expect(page.locator(".message-end")).to_have_text("Ended at the length limit")


def test_the_context_warns_near_its_end(page, fake):
    fake.will_say("x", counts=(CONTEXT // 2, 10))
    fake.will_say("x", counts=(CONTEXT - 100, 60))
    asked(page, "one")
    expect(page.locator("#near")).to_be_hidden()
    asked(page, "two")
    expect(page.locator("#near")).to_be_visible()
    expect(page.locator("#meter")).to_have_attribute("data-level", "full")
    expect(page.get_by_role("meter")).to_have_attribute("aria-label", "Context: 2,008 of 2,048 tokens used")


def test_the_view_follows_only_who_is_at_the_end(page, fake):
    more = threading.Event()

    def pieces() -> Iterator[str]:
        yield from (f"line {number}\n\n" for number in range(60))
        more.wait(WAIT / 1000)
        yield from (f"more {number}\n\n" for number in range(60))

    fake.replies.append(Reply(pieces()))
    box, distance = page.locator("#scroll"), "box => box.scrollHeight - box.scrollTop - box.clientHeight"
    ask(page, "Go")
    expect(page.get_by_text("line 59", exact=True)).to_be_in_viewport()
    assert box.evaluate(distance) < 2
    box.evaluate("box => { box.scrollTop = 0; }")
    expect(page.locator("#latest")).to_be_visible()
    more.set()
    expect(page.get_by_text("more 59", exact=True)).to_be_attached()
    expect(page.locator(".stats")).to_be_attached()
    assert box.evaluate("box => box.scrollTop") == 0
    page.locator("#latest").click()
    expect(page.get_by_text("more 59", exact=True)).to_be_in_viewport()
    expect(page.locator("#latest")).to_be_hidden()


# --- markdown


def test_markdown_becomes_elements(page, fake):
    fake.will_say(
        "# Title\n\nSome **bold**, *italic*, `code` and [a link](https://example.com/x).\n\n"
        "1. one\n   - inner\n2. two\n\n> quoted\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 |\n\n---\n\n```python\nprint('<b>')\n```\n",
    )
    answer = asked(page, "Go").locator(".markdown")
    expect(answer.locator("[data-level='1']")).to_have_text("Title")
    for selector, text in {"strong": "bold", "em": "italic", "p > code": "code", "blockquote p": "quoted"}.items():
        expect(answer.locator(selector)).to_have_text(text)
    expect(answer.locator("ol > li > ul > li")).to_have_text("inner")
    expect(answer.locator("tbody td")).to_have_text(["1", "2"])
    expect(answer.locator("td").last).to_have_class("align-end")
    expect(answer.locator("hr")).to_have_count(1)
    expect(answer.locator("figcaption span")).to_have_text("python")
    expect(answer.locator("pre code")).to_have_text("print('<b>')")
    link = answer.get_by_role("link", name="a link")
    expect(link).to_have_attribute("href", "https://example.com/x")
    expect(link).to_have_attribute("target", "_blank")
    expect(link).to_have_attribute("rel", re.compile("noopener"))


def test_what_a_model_writes_never_becomes_markup(page, fake):
    fake.will_say(*"\n\n".join(HOSTILE))
    answer = asked(page, HOSTILE[0]).locator(".markdown")
    expect(answer).to_contain_text("<img src=x onerror=window.hacked=1>")
    expect(page.locator(".plain")).to_have_text(HOSTILE[0])
    found = page.evaluate(
        """() => ({
          hacked: window.hacked ?? null,
          tags: [...new Set([...document.querySelectorAll(".markdown *")].map((one) => one.localName))],
          handlers: [...document.querySelectorAll("*")].flatMap((one) => one.getAttributeNames())
            .filter((name) => name.startsWith("on") || name === "style" || name === "srcdoc"),
          links: [...document.querySelectorAll("a[href]")].map((one) => one.protocol),
        })"""
    )
    safe = {"p", "br", "a", "code", "pre", "figure", "figcaption", "span", "button", "svg", "use", "h3", "blockquote"}
    safe |= {"ul", "li", "div", "table", "thead", "tbody", "tr", "th", "td"}
    assert found["hacked"] is None
    assert {*found["tags"]} <= safe
    assert found["handlers"] == ["style"] * len(found["handlers"])  # the message box's height, set by the page itself
    assert {*found["links"]} <= {"https:", "http:"}


def test_text_that_grows_ends_as_the_whole_text(page):
    """Every prefix is drawn; the elements at the end are those of the text drawn at once."""
    for text in DOCUMENTS:
        grown, whole = page.evaluate(
            """async (text) => {
              const { LiveMarkdown } = await import("./markdown/live.js");
              const { codeBlock } = await import("./ui/code_block.js");
              const grown = document.createElement("div");
              const whole = document.createElement("div");
              const live = new LiveMarkdown(grown, codeBlock);
              for (let end = 1; end <= text.length; end += 1) live.update(text.slice(0, end));
              new LiveMarkdown(whole, codeBlock).update(text);
              return [grown.innerHTML, whole.innerHTML];
            }""",
            text,
        )
        assert grown == whole


def test_markdown_takes_time_in_proportion_to_the_text(page):
    """Texts that make careless parsers quadratic; one of them would take minutes."""
    repeated = (
        "[",
        "](",
        "[a](b ",
        "*a ",
        "**a _b ",
        "`` ` ",
        "`a",
        ">",
        "> ",
        "- ",
        "|-",
        "![x",
        "http://",
        "<http://a",
        "~~a",
    )
    texts = [piece * (150_000 // len(piece)) for piece in repeated]
    texts += [
        "![" * 40_000 + "](http://a)" * 40_000,
        "- a\n\n\n" * 20_000,
        "\n".join("  " * n + "- a" for n in range(300)),
    ]
    seconds = page.evaluate(
        """async (texts) => {
          const { parseBlocks } = await import("./markdown/blocks.js");
          const begun = performance.now();
          for (const text of texts) parseBlocks(text);
          return (performance.now() - begun) / 1000;
        }""",
        texts,
    )
    assert seconds < 30


@pytest.mark.parametrize("visit", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True)
@pytest.mark.parametrize("clipboard", ["allowed", "missing"])
def test_code_and_messages_are_copied(page, fake, clipboard):
    if clipboard == "missing":  # as without TLS
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('missing')); }")
    fake.will_say("Run:\n\n```sh\nls -l | wc\necho '<b>'\n```\n")
    answer = asked(page, "How?")
    answer.get_by_role("button", name="Copy code").click()
    expect(answer.locator("figcaption [data-copied]")).to_have_attribute("aria-label", "Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "ls -l | wc\necho '<b>'"
    answer.get_by_role("button", name="Copy message").click()
    expect(answer.locator(".message-tools [data-copied]")).to_have_count(1)
    assert page.evaluate("navigator.clipboard.readText()") == "Run:\n\n```sh\nls -l | wc\necho '<b>'\n```\n"


# --- conversations


def test_conversations_outlive_a_reload(page, fake):
    fake.will_say("One.")
    asked(page, "first")
    page.keyboard.press("Control+k")
    fake.will_say("Two, **bold**.")
    asked(page, "second")
    page.reload()
    expect(conversations(page)).to_have_text(["second", "first"])
    expect(answers(page)).to_have_text("Two, bold.")
    expect(page.locator(".stats")).to_contain_text("10 tokens")
    page.get_by_role("button", name="first", exact=True).click()
    expect(answers(page)).to_have_text("One.")
    asked(page, "more")
    assert told(fake)[0] == ("user", "first")


def test_an_answer_cut_off_by_a_reload_is_kept_as_far_as_it_came(page, fake):
    fake.will_say("So far", hold=True)
    ask(page, "Go")
    expect(answers(page)).to_have_text("So far")
    page.reload()
    expect(answers(page)).to_have_text("So far")
    expect(page.locator(".message-end")).to_contain_text("Unfinished")
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page)).to_have_text(["Hello."])


def test_conversations_are_renamed_and_deleted_and_brought_back(page):
    asked(page, "A long question")
    row = page.locator(".conversation")
    row.hover()
    row.get_by_role("button", name="Rename").click()
    page.keyboard.type("Short")
    page.keyboard.press("Enter")
    expect(conversations(page)).to_have_text(["Short"])
    row.hover()
    row.get_by_role("button", name="Delete").click()
    expect(conversations(page)).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(conversations(page)).to_have_text(["Short"])
    page.reload()
    conversations(page).click()
    expect(answers(page)).to_have_text("Hello.")


def test_export_and_import(visit, page, fake, tmp_path):
    fake.will_say("**Fine.**")
    asked(page, "How/are: you?")

    def export(item: str) -> Path:
        page.locator("#transfer").click()
        with page.expect_download() as waiting:
            page.get_by_role("menuitem", name=item).click()
        path = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path

    markdown = export("Markdown")
    assert markdown.name == "How are you.md"
    assert markdown.read_text("utf-8") == (
        "# How/are: you?\n\n## You\n\nHow/are: you?\n\n## Model (chatglm-6b:latest)\n\n**Fine.**\n"
    )
    everything = export("all chats")
    [kept] = json.loads(everything.read_text("utf-8"))["conversations"]
    assert [message["content"] for message in kept["messages"]] == ["How/are: you?", "**Fine.**"]

    page.locator("#import-file").set_input_files(everything)
    expect(page.locator(".toast")).to_have_text("Imported: 1.")
    expect(conversations(page)).to_have_text(["How/are: you?"] * 2)
    page.evaluate("localStorage.clear()")
    page.goto(fake.address)
    page.reload()
    expect(page.locator(".sidebar-empty")).to_be_visible()
    page.locator("#import-file").set_input_files(everything)
    conversations(page).click()
    expect(answers(page).locator("strong")).to_have_text("Fine.")

    hostile = {"format": "glmexport-chat", "version": 1, "conversations": [{"messages": [{"role": "system"}]}]}
    for text in ("no json", "[]", json.dumps(hostile)):
        (tmp_path / "bad.json").write_text(text, "utf-8")
        page.locator("#import-file").set_input_files(tmp_path / "bad.json")
        expect(page.locator(".toast").last).to_have_text("This file is not an export of this page.")
        page.locator(".toast").last.get_by_role("button", name="Dismiss").click()
    expect(conversations(page)).to_have_count(1)


def test_two_tabs_keep_one_anothers_conversations(visit, page, fake):
    other = visit.open()
    asked(page, "from the first tab")
    asked(other, "from the second tab")
    for tab in (page, other):
        expect(conversations(tab)).to_have_text(["from the second tab", "from the first tab"])
    other.get_by_role("button", name="from the first tab", exact=True).click()
    asked(other, "seen in both")
    expect(page.locator(".plain")).to_have_text(["from the first tab", "seen in both"])


def test_a_conversation_changed_in_two_tabs_at_once_becomes_two(visit, page, fake):
    asked(page, "start")
    other = visit.open("#" + page.url.split("#")[1])
    expect(other.locator(".plain")).to_have_text(["start"])
    reply = fake.will_say("slow", hold=True)
    ask(page, "mine")
    expect(answers(page).last).to_have_text("slow")
    expect(answers(other).last).to_have_text("slow")
    fake.will_say("quick")
    other.get_by_role("button", name="Answer again").click()
    expect(answers(other).last).to_have_text("quick")
    expect(page.locator(".toast")).to_contain_text("Yours is kept as a copy.")
    reply.go_on.set()
    expect(conversations(page)).to_have_text(["start (2)", "start"])
    expect(answers(page).last).to_have_text("slow")
    page.reload()
    expect(answers(page).last).to_have_text("slow")
    page.get_by_role("button", name="start", exact=True).click()
    expect(answers(page).last).to_have_text("quick")


def test_a_full_storage_is_told_and_the_conversation_goes_on(page):
    page.evaluate(
        """() => {
          for (let size = 1 << 22; size > 0; size >>= 1) {
            try { localStorage.setItem(`filler${size}`, "x".repeat(size)); } catch {}
          }
        }"""
    )
    asked(page, "Is there room?")
    expect(page.locator("#banner")).to_contain_text("storage is full")
    expect(answers(page)).to_have_text("Hello.")
    page.evaluate(
        """() => {
          for (const key of Object.keys(localStorage)) if (key.startsWith("filler")) localStorage.removeItem(key);
        }"""
    )
    asked(page, "And now?")
    expect(page.locator("#banner")).to_be_hidden()
    page.reload()
    expect(page.locator(".plain")).to_have_text(["Is there room?", "And now?"])


# --- settings


def test_sampling_shows_defaults_and_sends_only_what_was_chosen(page, fake):
    page.locator("#panel-open").click()
    temperature = page.get_by_role("spinbutton", name="Temperature")
    expect(temperature).to_have_attribute("placeholder", "0.95")
    expect(page.get_by_role("spinbutton", name="Top p")).to_have_attribute("placeholder", "0.7")
    expect(page.get_by_role("textbox", name="Stop texts")).to_have_attribute("placeholder", "<eop>")
    temperature.fill("0.4")
    page.get_by_role("spinbutton", name="Seed").fill("7")
    page.get_by_role("spinbutton", name="Top k").fill("-3")
    expect(page.locator("#error-top_k")).to_have_text("Between 0 and 100,000")
    page.get_by_role("textbox", name="Stop texts").fill("问：\nEND\n")
    page.locator("#system").fill("Be brief.")
    expect(page.locator("#composer-system")).to_be_visible()
    asked(page, "Go")
    assert fake.chats[-1]["options"] == {"temperature": 0.4, "seed": 7, "stop": ["问：", "END"]}
    assert told(fake) == [("system", "Be brief."), ("user", "Go")]

    page.reload()
    expect(page.locator("#option-temperature")).to_have_value("0.4")
    page.get_by_role("button", name="Reset Temperature to the default").click()
    asked(page, "Again")
    assert fake.chats[-1]["options"] == {"seed": 7, "stop": ["问：", "END"]}
    page.get_by_role("button", name="Reset all to defaults").click()
    asked(page, "And again")
    assert fake.chats[-1]["options"] == {}


def test_another_model_is_chosen_and_remembered(page, fake):
    page.locator("#model").select_option("tiny-chatglm:latest")
    asked(page, "Go")
    assert fake.chats[-1]["model"] == "tiny-chatglm:latest"
    page.keyboard.press("Control+k")
    expect(page.locator("#model")).to_have_value("tiny-chatglm:latest")


# --- looks and languages


def test_the_theme_follows_the_system_until_one_is_chosen(page):
    light = colour(page, "body", "backgroundColor")
    page.emulate_media(color_scheme="dark")
    dark = colour(page, "body", "backgroundColor")
    assert dark != light
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
    assert colour(page, "body", "backgroundColor") == light
    page.emulate_media(color_scheme="light")
    page.locator("#theme").click()
    assert colour(page, "body", "backgroundColor") == dark
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert colour(page, "body", "backgroundColor") == dark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_its_ground(page, theme):
    """A contrast of 4.5 : 1 for text, 3 : 1 for borders of fields and pictures."""
    page.emulate_media(color_scheme=theme)
    names = sorted({*re.findall(r"(--[\w-]+): #", (PAGE / "css" / "theme.css").read_text("utf-8"))})
    values = page.evaluate(
        "names => names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(name))", names
    )
    colours = {name[2:]: luminance(value) for name, value in zip(names, values, strict=True)}
    grounds = ("ground", "surface", "sunken", "code")
    pairs = [(text, ground, 4.5) for text in ("text", "muted", "accent") for ground in grounds]
    pairs += [("on-accent", "accent", 4.5), ("on-accent", "accent-hover", 4.5), ("on-accent-soft", "accent-soft", 4.5)]
    pairs += [("text", "hover", 4.5), ("muted", "hover", 4.5), ("ground", "text", 4.5), ("muted", "accent-soft", 4.5)]
    pairs += [(text, f"{text}-soft", 4.5) for text in ("danger", "warning")] + [("danger", "sunken", 4.5)]
    pairs += [("line-strong", ground, 3) for ground in grounds]
    low = {(text, ground): ratio for text, ground, least in pairs if (ratio := contrast(colours, text, ground)) < least}
    assert low == {}


def luminance(value: str) -> float:
    digits = value.strip().lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(colours: dict[str, float], one: str, other: str) -> float:
    low, high = sorted((colours[one], colours[other]))
    return (high + 0.05) / (low + 0.05)


def test_motion_is_left_out_where_it_is_not_wanted(page, fake):
    reply = fake.will_say("x", hold=True)
    ask(page, "Go")
    expect(answers(page)).to_have_text("x")
    moving = "element => getComputedStyle(element, '::before').animationName"
    assert page.locator(".phase").evaluate(moving) == "breathe"
    page.emulate_media(reduced_motion="reduce")
    assert page.locator(".phase").evaluate(moving) == "none"
    reply.go_on.set()


@pytest.mark.parametrize(
    ("visit", "language", "greeting"),
    [({"locale": "zh-CN"}, "zh-CN", "想聊点什么？"), ({"locale": "fr-FR"}, "en", "What shall we talk about?")],
    indirect=["visit"],
)
def test_the_language_is_the_browsers(page, language, greeting):
    expect(page.locator("html")).to_have_attribute("lang", language)
    expect(page.locator("#welcome h2")).to_have_text(greeting)


def test_the_language_changes_at_once_and_for_good(page, fake):
    fake.will_say("One, **two**.")
    asked(page, "Count")
    page.locator("#language").click()
    expect(page.locator("#composer-text")).to_have_attribute("placeholder", "输入消息")
    expect(page.locator(".stats")).to_contain_text("词元/秒")
    expect(answers(page).locator("strong")).to_have_text("two")
    page.reload()
    expect(page.locator("#new-chat")).to_contain_text("新对话")
    page.get_by_role("button", name="Switch to English").click()
    expect(page.locator("#new-chat")).to_contain_text("New chat")


def test_both_languages_have_every_text(page):
    keys = page.evaluate(
        """async () => {
          const texts = await Promise.all(["en", "zh"].map((name) => import(`./i18n/${name}.js`)));
          const fields = (text) => [...text.matchAll(/\\{(\\w+)\\}/g)].map((match) => match[1]).sort().join();
          const named = (one) => Object.entries(one.default).map(([key, text]) => [key, fields(text)]);
          return texts.map((one) => Object.fromEntries(named(one)));
        }"""
    )
    assert keys[0] == keys[1]
    used = set()
    for path in PAGE.rglob("*.*"):
        if path.suffix in (".js", ".html") and path.parent.name != "i18n":
            text = path.read_text("utf-8")
            used |= {
                *re.findall(r'\bt\(\s*"([\w.]+)"', text),
                *re.findall(r'data-(?:text|label|placeholder)="([^"]+)"', text),
            }
    assert used <= {*keys[0]}


def test_everything_that_can_be_used_has_a_name(page):
    asked(page, "Hello")
    page.locator("#panel-open").click()
    for selector in ("button:visible", "input:visible", "select:visible", "textarea:visible"):
        for element in page.locator(selector).all():
            if element.get_attribute("aria-hidden") != "true":
                expect(element).to_have_accessible_name(re.compile(r"\S"))


# --- keyboard


def test_keys(page, fake):
    text = page.locator("#composer-text")
    expect(text).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert fake.chats == []
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Hello.")
    assert told(fake) == [("user", "one\ntwo")]
    expect(text).to_have_value("")

    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_hidden()
    page.locator("#scroll").focus()
    page.keyboard.press("/")
    expect(text).to_be_focused()
    expect(text).to_have_value("")
    page.keyboard.type("is it 1/2?")
    expect(text).to_have_value("is it 1/2?")

    page.keyboard.press("Control+,")
    expect(page.locator("#panel")).to_be_visible()
    page.keyboard.press("Control+b")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.keyboard.press("Control+k")
    expect(page.locator("#welcome")).to_be_visible()

    page.locator("#transfer").press("Enter")
    expect(page.get_by_role("menuitem", name="all chats")).to_be_focused()  # there is no open chat to export
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("menuitem", name="Import")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#transfer-menu")).to_be_hidden()
    expect(page.locator("#transfer")).to_be_focused()


def test_enter_that_chooses_a_word_does_not_send(page, fake):
    text = page.locator("#composer-text")
    text.fill("ni hao")
    text.evaluate(
        """box => box.dispatchEvent(
          new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))"""
    )
    expect(text).to_have_value("ni hao")
    assert fake.chats == []
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Hello.")


# --- a phone


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_nothing_is_wider_than_a_phone(page, fake):
    wide = "x" * 300
    fake.will_say(
        f"{wide}\n\n```\n{wide}\n```\n\n|{'head|' * 12}\n|{'---|' * 12}\n|{'cell|' * 12}\n\n1. `{wide}`\n\n# {wide}"
    )
    fake.will_say(status=400, error=wide)
    asked(page, wide)
    asked(page, "again")
    fits = "() => ['html', '#scroll'].every((name) => document.querySelector(name).scrollWidth <= innerWidth)"
    assert page.evaluate(fits)
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    page.locator("#panel-open").click()
    expect(page.locator("#panel")).to_be_in_viewport()
    assert page.evaluate(fits)


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_the_drawer_keeps_the_focus_and_gives_it_back(page):
    asked(page, "Hello")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.locator("#sidebar-open").tap()
    expect(page.get_by_role("dialog", name="Conversations")).to_be_visible()
    expect(page.locator("#main")).to_have_attribute("inert", "")
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#sidebar-open")).to_be_focused()
    page.locator("#sidebar-open").tap()
    page.locator("#new-chat").tap()
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#welcome")).to_be_visible()


# --- what goes wrong


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({"status": 400, "error": "The prompt has 3000 tokens, the context 2048."}, "The server refused the request."),
        ({"status": 404, "error": "not found"}, "The server no longer has the model “chatglm-6b”."),
        ({"status": 503, "error": "full", "headers": {"Retry-After": "5"}}, "It suggests trying again in 5 s."),
        ({"status": 503, "error": "full"}, "The server is busy."),
        ({"status": 500, "error": "oops"}, "The server failed while answering."),
        ({"pieces": ["Half"], "error": "out of memory"}, "The server failed while answering."),
        ({"pieces": ["Half"], "cut": True}, "The connection ended before the answer was complete."),
    ],
)
def test_an_error_is_a_sentence_with_a_way_on(page, fake, reply, text):
    reply = Reply(**reply, hold="pieces" in reply)
    fake.replies.append(reply)
    ask(page, "Go")
    expect(answers(page)).to_have_text("".join(reply.pieces))
    reply.go_on.set()
    expect(page.locator(".message-error")).to_contain_text(text)
    expect(page.locator(".message-error")).to_contain_text(reply.error)
    page.reload()
    expect(answers(page)).to_have_text("".join(reply.pieces))
    expect(page.get_by_role("alert").filter(has_text=text)).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text(["Hello."])
    assert told(fake) == [("user", "Go")]


def test_a_question_without_an_answer_is_not_told_again(page, fake):
    fake.will_say(status=500, error="oops")
    asked(page, "one")
    asked(page, "two")
    assert told(fake) == [("user", "two")]


def test_a_server_that_is_down(visit, fake):
    visit.context.route("**/api/*", lambda route: route.abort())
    page = visit.open()
    expect(page.locator("#banner")).to_contain_text("The server cannot be reached.")
    ask(page, "Anybody?")
    expect(page.locator(".message-error")).to_contain_text("The server cannot be reached.")
    visit.context.unroute("**/api/*")
    page.locator("#banner").get_by_role("button", name="Try again").click()
    expect(page.locator("#banner")).to_be_hidden()
    page.locator(".retry").click()
    expect(answers(page)).to_have_text(["Hello."])
    assert fake.chats[-1]["model"] == "chatglm-6b:latest"


def test_a_model_that_is_gone_can_be_replaced(page, fake):
    asked(page, "one")
    fake.models = ("tiny-chatglm:latest",)
    fake.will_say(status=404, error="model 'chatglm-6b' not found")
    asked(page, "two")
    expect(page.locator("#model option")).to_have_text(["chatglm-6b", "tiny-chatglm"])
    page.locator("#model").select_option("tiny-chatglm:latest")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page).last).to_have_text("Hello.")
    assert fake.chats[-1]["model"] == "tiny-chatglm:latest"


def test_a_server_without_models_says_so(visit, fake):
    fake.models = ()
    page = visit.open()
    expect(page.locator("#banner")).to_contain_text("The server offers no model.")


def test_the_key_is_asked_for_and_kept_in_the_tab_only(visit, fake):
    fake.key = "s3cret"
    page = visit.open()
    dialog = page.get_by_role("dialog", name="Key needed")
    dialog.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("The server did not accept this key.")
    dialog.get_by_label("Key").fill("s3cret")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("chatglm-6b:latest")
    expect(dialog).to_be_hidden()
    asked(page, "Go")
    fake.key = "changed"
    ask(page, "Once more")
    dialog.get_by_label("Key").fill("changed")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(["Hello.", "Hello."])
    assert "changed" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('glmexport.key')") == "changed"


def test_the_page_is_held_to_its_policy(visit, page):
    """What the other tests rely on: the browser reports what the policy forbids."""
    page.evaluate(
        """() => new Promise((resolve) => {
          document.addEventListener("securitypolicyviolation", resolve, { once: true });
          document.body.append(Object.assign(document.createElement("script"), { textContent: "window.hacked = 1" }));
        }).then(() => undefined)"""
    )
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in problem for problem in visit.problems)
    visit.problems.clear()


def test_no_file_of_the_page_reaches_outside_or_makes_markup_of_text():
    for path in PAGE.rglob("*.*"):
        if path.suffix not in (".js", ".html", ".css", ".svg", ".webmanifest"):
            continue
        text = path.read_text("utf-8")
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "new Function",
        ):
            assert way not in text, path
        addresses = {*re.findall(r"https?://[\w.]+", text)} - {"http://www.w3.org"}
        assert not addresses, path
