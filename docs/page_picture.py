"""Draw the README's picture of the web page: a conversation with the example, in a window and on a phone.

    glmexport split examples/tiny-chatglm -o tiny && glmexport serve tiny
    python docs/page_picture.py http://127.0.0.1:11434 docs

The answers are the served model's. Needs a Chromium, the server's address and its only model being the example.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, expect, sync_playwright

QUESTIONS = ("你好", "12+34=", "我叫小明。", "我叫什么名字？")
OTHERS = ("Reverse: orange", "7*8=", "你会做什么？")
GAP, COLOURS, GROUND = 40, 128, (226, 224, 218)
WINDOW = {"viewport": {"width": 1180, "height": 890}, "color_scheme": "light", "locale": "en-US"}
PHONE = {"viewport": {"width": 390, "height": 890}, "color_scheme": "dark", "locale": "zh-CN"}
TOUCH = {"is_mobile": True, "has_touch": True}


def shot(browser: Browser, address: str, **options: object) -> Image.Image:
    """The page after a conversation that others were held before."""
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.goto(address)
    expect(page.locator("#model")).not_to_have_value("")
    for conversation in (*((other,) for other in OTHERS), QUESTIONS):
        page.keyboard.press("Control+k")
        for number, question in enumerate(conversation, 1):
            page.locator("#composer-text").fill(question)
            page.keyboard.press("Enter")
            expect(page.locator("[aria-busy=false]")).to_have_count(number)
    page.mouse.move(2, 2)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def main(address: str, folder: Path) -> None:
    """Write `page.png`."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        pictures = [shot(browser, address, **WINDOW), shot(browser, address, **PHONE, **TOUCH)]
        browser.close()
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) + 1)
    whole = Image.new("RGB", (width, pictures[0].height + 2 * GAP), GROUND)
    left = GAP
    for picture in pictures:
        whole.paste(picture, (left, GAP))
        left += picture.width + GAP
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(folder / "page.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
