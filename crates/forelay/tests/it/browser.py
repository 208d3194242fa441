"""The dashboard in headless Chromium, for browser.rs.

Arguments: the dashboard's address with its token, a directory for screenshots, a VM's name.
Says on standard output what it waits for, a word a line, and goes on after a line on standard
input. Ends with 1 and says what is wrong at the first thing that is.
"""

import json
import pathlib
import shutil
import sys
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

ADDRESS, PICTURES, VM = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
ORIGIN = "http://" + urlsplit(ADDRESS).netloc
PAGES = {
    "memory": "/",
    "forecast": "/ui/forecast",
    "launches": "/ui/launches",
    "vm": f"/ui/vms/{VM}",
    "repository": "/ui/repository",
    "pressure": "/ui/pressure",
}
WIDTHS = {1280: 800, 390: 844}
PATIENCE_MS = 240_000


def check(right, words):
    if not right:
        sys.exit(f"browser.py: {words}")


def say(word):
    print(word, flush=True)
    check(sys.stdin.readline(), f"nobody answered to {word}")


def watched(context):
    """A page whose complaints, and what it asks of others than the daemon, are failures."""
    page = context.new_page()
    wrong = []
    page.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(ORIGIN + "/") or wrong.append(asked.url))
    return page, wrong


def opened(page, path):
    answer = page.goto(ORIGIN + path)
    check(answer.status == 200, f"{path}: {answer.status}")


def accessible(page, where):
    found = Axe().run(page).response["violations"]
    found = [one for one in found if one["impact"] in ("serious", "critical")]
    short = [
        (one["id"], one["help"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found
    ]
    check(not found, f"{where}: axe-core: {json.dumps(short, indent=1)}")


def look(context, suffix, audited):
    """Every page, as it is seen."""
    page, wrong = watched(context)
    for name, path in PAGES.items():
        opened(page, path)
        where = f"{name}-{suffix}"
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        check(wide <= 0, f"{where}: {wide} pixels wider than the window")
        if audited:
            accessible(page, where)
        page.screenshot(path=PICTURES / f"{where}.png", full_page=True, animations="disabled")
        check(not wrong, f"{where}: {wrong}")
    page.close()


def keyboard(context):
    page, wrong = watched(context)
    opened(page, "/")
    focused = lambda: page.evaluate("document.activeElement.textContent.trim()")
    page.keyboard.press("Tab")
    check(focused() == "Skip to content", focused())
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    inside = page.evaluate("document.getElementById('page').contains(document.activeElement)")
    check(inside, f"behind the skip link: {focused()}")
    page.goto(ORIGIN + "/")
    for _ in range(4):
        page.keyboard.press("Tab")
    check(focused() == "Forecast", focused())
    page.keyboard.press("Enter")
    page.wait_for_url(ORIGIN + "/ui/forecast")
    check(not wrong, f"keyboard: {wrong}")
    page.close()


def live(context):
    """What happens is shown unasked, what has the focus keeps it, and a lost daemon is told."""
    page, _ = watched(context)
    opened(page, "/")
    link = page.locator(f"a[href='/ui/vms/{VM}']")
    link.focus()
    page.evaluate("document.getElementById('page').dataset.before = 'yes'")
    page.locator("#page[data-before]").wait_for(state="detached")
    kept = page.evaluate("document.activeElement.textContent")
    check(kept == VM, f"the focus went to {kept}")
    opened(page, "/ui/pressure")
    say("stop")
    page.locator(".k-stopped").first.wait_for()
    say("end")
    page.locator("#live.lost").get_by_text("No connection to the daemon").wait_for()
    say("start")
    page.locator("#live:not(.lost)").wait_for()
    page.close()


def elsewhere(browser, context):
    """A page of another origin in the same browser learns and changes nothing."""
    evil = "http://evil.example/"
    form = f"<form method=post action='{ORIGIN}/v1/memory/drop'><button>go</button></form>"
    html = {"content_type": "text/html", "body": f"<title>evil</title>{form}"}
    context.route(f"{evil}**", lambda route: route.fulfill(**html))
    page = context.new_page()
    page.goto(evil)
    for mode in ("cors", "no-cors"):
        asked = f"fetch('{ORIGIN}/v1/vms', {{mode: '{mode}', credentials: 'include'}})"
        told = page.evaluate(f"{asked}.then((a) => a.text(), () => '')")
        check(told == "", f"{mode}: {told}")
    with page.expect_navigation() as navigation:
        page.get_by_role("button").click()
    status = navigation.value.status
    check(status in (401, 403), f"a form of another origin: {status}")
    # A link from there comes without the session: what it leads to says nothing.
    page.goto(evil)
    page.evaluate(f"location.href = '{ORIGIN}/'")
    page.wait_for_url(ORIGIN + "/")
    check("no token" in page.content(), page.content())
    page.close()
    stranger = browser.new_context()
    answer = stranger.new_page().goto(ORIGIN + "/")
    check(answer.status == 401, f"without a session: {answer.status}")
    stranger.close()


def main():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        contexts = {}
        for width, height in WIDTHS.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                context.set_default_timeout(PATIENCE_MS)
                page = context.new_page()
                page.goto(ADDRESS)
                check("token" not in page.url, page.url)
                page.close()
                contexts[(width, scheme)] = context
        for (width, scheme), context in contexts.items():
            suffix = f"{width}" if scheme == "light" else f"{width}-dark"
            # Neither colours nor columns change what a screen reader is told on both widths.
            look(context, suffix, audited=(width, scheme) != (390, "dark"))
        wide = contexts[(1280, "light")]
        keyboard(wide)
        elsewhere(browser, wide)
        live(wide)
        browser.close()
    print("done", flush=True)


main()
