"""Tests of the page in a real browser."""

import shutil
import threading

import pytest
from helpers import HAM, SPAM, missing
from playwright.sync_api import expect, sync_playwright
from werkzeug.serving import make_server

from app import create_app
from score import load_card

SPAM, HAM = SPAM[0], HAM[0]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing("no Chromium on this machine: apt-get install chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def server():
    """A server of the application, which a test may shut down."""
    server = make_server("127.0.0.1", 0, create_app(), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["desktop", "phone"])
def page(request, browser, server):
    """The page as it opens, on a desktop in light colours and on a phone in dark ones."""
    size, scheme = {"desktop": ((1000, 800), "light"), "phone": ((360, 700), "dark")}[request.param]
    context = browser.new_context(
        viewport=dict(zip(("width", "height"), size, strict=True)),
        color_scheme=scheme,
        has_touch=request.param == "phone",
    )
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(error))
    page.on("request", lambda sent: None if "//127.0.0.1" in sent.url else faults.append(sent.url))
    page.goto(f"http://127.0.0.1:{server.port}/")
    yield page
    context.close()
    assert not faults


def test_spam_and_ham(page):
    expect(page.locator("#result")).to_be_hidden()
    page.get_by_label("Message").press_sequentially(SPAM)
    expect(page.locator("#verdict")).to_have_text("Spam")
    expect(page.locator("#propensity")).to_contain_text("likely to be spam")
    page.get_by_label("Message").fill(HAM)
    expect(page.locator("#verdict")).to_have_text("Ham")
    page.get_by_label("Message").fill("")
    expect(page.locator("#result")).to_be_hidden()


def test_highlights(page):
    text = f"{HAM}  😀\n{SPAM}"
    page.get_by_label("Message").fill(text)
    expect(page.locator("#message")).to_have_text(text, use_inner_text=False)
    marks = page.locator("#message mark")
    expect(marks).to_have_count(len("".join(text.split())))
    colours = marks.evaluate_all("marks => marks.map(mark => [mark.textContent, mark.style.backgroundColor])")
    towards_spam = "".join(character for character, colour in colours if "--spam-rgb" in colour)
    towards_ham = "".join(character for character, colour in colours if "--ham-rgb" in colour)
    assert "£100,000" in towards_spam
    assert "later" in towards_ham
    assert colours[0][1] != colours[-1][1]
    expect(page.locator("#towards-spam")).to_contain_text("£100,000")
    expect(page.locator("#towards-ham b")).not_to_have_count(0)
    page.get_by_label("Message").fill("<b>free</b>")
    expect(page.locator("#message")).to_have_text("<b>free</b>")


def test_threshold(page):
    card = load_card()
    slider = page.get_by_role("slider", name="Threshold")
    shown = page.locator("#threshold-value")
    page.get_by_label("Message").fill(HAM)
    expect(page.locator("#verdict")).to_have_text("Ham")
    assert float(shown.text_content()) == pytest.approx(card["threshold"], abs=1e-4)
    expect(page.locator("#reset")).to_be_hidden()

    slider.press("Home")
    expect(shown).to_have_text("0")
    expect(page.locator("#verdict")).to_have_text("Spam")
    for name in ("precision", "recall"):
        expect(page.locator(f"#{name}")).to_have_text(f"{100 * card['operating_points'][0][name]:.1f}%")

    slider.press("End")
    expect(shown).to_have_text("1")
    expect(page.locator("#recall")).to_have_text("0.0%")
    page.get_by_label("Message").fill(SPAM)
    expect(page.locator("#verdict")).to_have_text("Ham")

    slider.press("ArrowLeft")
    expect(shown).to_have_text("0.99")
    page.get_by_role("button", name="Back to the chosen one").click()
    assert float(shown.text_content()) == pytest.approx(card["threshold"], abs=1e-4)
    expect(page.locator("#verdict")).to_have_text("Spam")


def test_examples_by_keyboard(page):
    verdicts = set()
    for button in page.locator("#examples button").all():
        button.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_label("Message")).to_have_value(button.get_attribute("data-text"))
        expect(page.locator("#message")).to_have_text(button.get_attribute("data-text"))
        verdicts.add(page.locator("#verdict").text_content())
    assert verdicts == {"Spam", "Ham"}


def test_page_fits_the_screen(page):
    page.get_by_label("Message").fill("x" * 300)
    expect(page.locator("#result")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_server_gone(page, server):
    page.get_by_label("Message").fill(SPAM)
    expect(page.locator("#verdict")).to_have_text("Spam")
    expect(page.get_by_role("alert")).to_be_hidden()
    server.shutdown()
    server.server_close()
    page.get_by_label("Message").fill(HAM)
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")


def test_message_refused(page):
    for length, reason in ((2**20, "the body is larger"), (10_001, "a text has at most 10000 characters")):
        page.get_by_label("Message").fill("x" * length)
        expect(page.get_by_role("alert")).to_contain_text(f"The server refused the message: {reason}")
    page.get_by_label("Message").fill(HAM)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_without_javascript(browser, server):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.get_by_label("Message").fill(SPAM)
    page.get_by_role("button", name="Score it").click()
    expect(page.locator("body")).to_contain_text('"prediction":true')
    context.close()
