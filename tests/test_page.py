"""Tests of the page in a real browser."""

import contextlib
import shutil
import threading

import pytest
from helpers import HAM, SPAM, LengthModel, missing, stub_card
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


@contextlib.contextmanager
def served(app):
    """Serve an application from a thread."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:  # or a failing test would hang
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server():
    """A server of the application, which a test may shut down."""
    with served(create_app()) as server:
        yield server


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
    assert "Sorry" in towards_ham
    assert colours[0][1] != colours[-1][1]
    expect(page.locator("#towards-spam")).to_contain_text("£100,000")
    expect(page.locator("#towards-ham b")).not_to_have_count(0)
    page.get_by_label("Message").fill("<b>free</b>")
    expect(page.locator("#message")).to_have_text("<b>free</b>")


def expect_figures(page, point):
    """Expect the figures of an operating point, each as it is written, in the row and column that say what it is."""
    written = page.locator("#trade-off").evaluate(
        """table => Object.fromEntries([...table.tBodies[0].rows].flatMap(row => [1, 2].map(column => [
            `${row.cells[0].textContent}, ${table.tHead.rows[0].cells[column].textContent}`,
            row.cells[column].textContent])))"""
    )
    columns = {"messages of today": "today", "messages of 2006": "collection"}
    rows = {"spam caught": "recall", "genuine messages taken down": "ham_blocked"}
    expected = {f"{row}, {column}": 100 * point[columns[column]][rows[row]] for row in rows for column in columns}
    assert {name: float(figure.removesuffix("%")) for name, figure in written.items()} == pytest.approx(
        expected, abs=0.0501
    )
    assert all(figure.endswith("%") for figure in written.values())
    for name, share in expected.items():
        assert (float(written[name].removesuffix("%")) > 0) is (share > 0), "a small share is written as none"


def test_threshold(page):
    card = load_card()
    points = {point["threshold"]: point for point in card["operating_points"]}
    near = min(points, key=lambda threshold: abs(threshold - card["threshold"]))
    slider = page.get_by_role("slider", name="Threshold")
    shown = page.locator("#threshold-value")
    page.get_by_label("Message").fill(HAM)
    expect(page.locator("#verdict")).to_have_text("Ham")
    assert float(shown.text_content()) == pytest.approx(card["threshold"], abs=1e-4)
    assert near == pytest.approx(card["threshold"], abs=0.005)
    expect_figures(page, points[near])
    expect(page.locator("#reset")).to_be_hidden()

    slider.press("Home")
    expect(shown).to_have_text("0")
    expect(page.locator("#verdict")).to_have_text("Spam")
    expect_figures(page, points[0])

    slider.press("End")
    expect(shown).to_have_text("1")
    expect_figures(page, points[1])
    page.get_by_label("Message").fill(SPAM)
    expect(page.locator("#verdict")).to_have_text("Ham")

    slider.press("ArrowLeft")
    expect(shown).to_have_text("0.99")
    expect_figures(page, points[0.99])
    page.get_by_role("button", name="Back to the chosen one").click()
    assert float(shown.text_content()) == pytest.approx(card["threshold"], abs=1e-4)
    expect(page.locator("#verdict")).to_have_text("Spam")


def test_warning_label(page):
    slider, action, mark = page.get_by_role("slider"), page.locator("#action"), page.locator("#label-mark")
    label = load_card()["thresholds"]["precision"]
    page.get_by_label("Message").fill(HAM)
    expect(action).to_contain_text("Delivered: it reaches neither")
    expect(action).to_contain_text(f"{label:.4f}".rstrip("0"))
    expect(mark).to_be_visible()
    left = mark.evaluate("mark => mark.offsetLeft / mark.parentElement.offsetWidth")
    assert left == pytest.approx(label, abs=0.02)

    page.get_by_label("Message").fill(SPAM)
    expect(action).to_contain_text("Taken down")
    slider.press("End")  # where nothing is taken down any more
    expect(page.locator("#verdict")).to_have_text("Ham")
    expect(action).to_contain_text("Delivered with a warning label")

    slider.press("Home")  # where all is taken down before a label would come
    expect(action).to_contain_text("Taken down")
    expect(mark).to_be_hidden()


def test_quality_on_test_messages(page):
    on_test = load_card()["metrics"]["test"]
    expect(page.locator("footer")).to_contain_text(
        f"AUCPR on test messages: {on_test['today']['aucpr']} of today, {on_test['collection']['aucpr']} of 2006"
    )


def test_price(page):
    threshold = load_card()["threshold"]
    price = f"taking down a genuine message costs {threshold / (1 - threshold):.3g} times as much"
    expect(page.locator("main")).to_contain_text(price)


GENUINE = {"a one-time password", "a bank alert", "an appointment", "a late friend"}


def test_examples_by_keyboard(page):
    ham = set()
    for button in page.locator("#examples button").all():
        page.get_by_label("Message").fill("")
        expect(page.locator("#result")).to_be_hidden()
        button.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_label("Message")).to_have_value(button.get_attribute("data-text"))
        expect(page.locator("#message")).to_have_text(button.get_attribute("data-text"))
        if page.locator("#verdict").text_content() == "Ham":
            ham.add(button.text_content())
    assert ham == GENUINE
    assert page.locator("#examples button").count() == 7


@pytest.mark.parametrize("points", [[], [{"threshold": at} for at in (0, 0.5, 1)]])
def test_a_card_without_measurements(browser, points):
    with served(create_app(LengthModel(), stub_card(threshold=0.2, operating_points=points))) as server:
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(error))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.get_by_label("Message").fill("x" * 30)
        expect(page.locator("#verdict")).to_have_text("Spam")
        expect(page.locator("#label-mark")).to_be_hidden()
        expect(page.locator("#threshold-value")).to_have_text("0.2")
        expect(page.locator("#trade-off tbody td")).to_have_text(["\u2013"] * 4 if points else [])
        page.get_by_role("slider").press("End")
        expect(page.locator("#verdict")).to_have_text("Ham")
        expect(page.locator("#action")).to_have_text("Delivered: it does not reach the threshold of 1.")
        page.close()
        assert not faults


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
