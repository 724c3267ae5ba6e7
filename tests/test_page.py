"""Tests of the page in a real browser."""

import io
import json
import time

import pytest
from helpers import HAM, SPAM, LengthModel, stub_card
from matplotlib.image import imread
from pages import contrast, expect_contrast, served
from playwright.sync_api import expect

from app import create_app
from score import load_card

SPAM, HAM = SPAM[0], HAM[0]
pytestmark = pytest.mark.browser


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
    assert set(page.locator("mark.spam").all_text_contents()) >= {"£100,000", "FREE", "claim"}
    assert set(page.locator("mark.ham").all_text_contents()) <= set(text.split())
    assert page.locator("mark.ham").count() > 0
    background = "word => getComputedStyle(word).backgroundColor"
    shades = [page.locator("mark", has_text=word).evaluate(background) for word in ("£100,000", "FREE")]
    assert shades[0] != shades[1]
    expect(page.locator("#towards-spam")).to_contain_text("£100,000")
    expect(page.locator("#towards-ham b")).not_to_have_count(0)
    page.get_by_label("Message").fill("<b>free</b>")
    expect(page.locator("#message")).to_have_text("<b>free</b>")


def answer_with(page, pushes):
    """Let /explain answer that each one-letter word of a message pushes as much as given, in log-odds."""
    contributions = [share for push in pushes for share in (push, 0.0)]
    answer = {"prediction": True, "propensity": 0.95, "threshold": 0.9, "contributions": contributions}
    page.route("**/explain", lambda route: route.fulfill(json=answer))


def test_numbers_are_read_without_a_mouse(page):
    answer_with(page, [1.24, 0.01, -0.55, 1.24])
    page.get_by_label("Message").fill("a b c a")
    message = page.locator("#message")
    expect(message).to_match_aria_snapshot("- paragraph:\n  - mark: a\n  - text: b\n  - mark: c\n  - mark: a")
    expect(page.locator("#towards-spam li")).to_have_text(["a 2.5"])
    expect(page.locator("#towards-ham li")).to_have_text(["c 0.6"])
    page.get_by_role("checkbox", name="numbers in the text").press("Space")
    expect(message).to_match_aria_snapshot(
        "- paragraph:\n  - mark: a +1.2\n  - text: b\n  - mark: c \u22120.6\n  - mark: a +1.2"
    )
    page.get_by_label("Message").fill("a b c a ")
    expect(message).to_have_text("a b c a ", use_inner_text=False)


def test_a_long_message_has_few_elements(page):
    text = "a " * 5000
    page.get_by_label("Message").fill(text)
    expect(page.locator("#message")).to_have_text(text, use_inner_text=False)
    expect(page.locator("#cut")).to_be_hidden()
    answer_with(page, [1 + i / 5000 for i in range(5000)])
    page.get_by_label("Message").fill(text.strip())
    expect(page.locator("#cut")).to_be_visible()
    expect(page.locator("#message mark")).to_have_count(200)
    assert page.locator("#message").evaluate("message => message.lastChild.textContent") == "a"
    assert page.locator("*").count() < 400
    assert page.locator("#message").evaluate("message => message.childNodes.length") <= 401


def expect_slider_to_stand_out(page):
    """Expect that the track and the thumb of the slider, whose styles no script can read, differ from the card."""
    slider = page.get_by_role("slider")
    slider.press("Home")
    slider.blur()
    image = imread(io.BytesIO(slider.screenshot()))[..., :3]
    height, card, middle = len(image), image[0, 0], image[len(image) // 2]
    track, thumb = middle[-height], middle[height // 3]
    assert contrast(track, card) >= 3
    assert contrast(thumb, card) >= 3
    assert max(contrast(colour, track) for colour in middle[height // 3 : height]) >= 3, "no gap between the two"


def test_contrast(page):
    pushes = [sign * (0.05 + step / 5) for step in range(21) for sign in (1, -1)]
    answer_with(page, pushes)
    page.get_by_label("Message").fill("w " * len(pushes))
    expect(page.locator("#message mark")).to_have_count(len(pushes))
    page.get_by_role("checkbox").check()
    page.get_by_role("slider").press("ArrowLeft")
    expect(page.locator("#reset")).to_be_visible()
    found = expect_contrast(page)
    assert {entry["kind"] for entry in found} == {"text", "border", "meter", "gap", "focus"}
    assert sum(entry["name"].startswith("MARK") for entry in found) == 2 * len(pushes)
    expect_slider_to_stand_out(page)

    page.route("**/explain", lambda route: route.fulfill(status=400, json={"error": "for a test"}))
    page.get_by_label("Message").fill("w")
    expect(page.get_by_role("alert")).to_be_visible()
    expect_contrast(page)
    page.goto(page.url + "docs")
    expect_contrast(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forced_colours(browser, server, scheme):
    context = browser.new_context(forced_colors="active", color_scheme=scheme)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.get_by_label("Message").fill(f"{SPAM} {HAM}")
    expect(page.locator("mark.ham")).not_to_have_count(0)
    lines = "words => [...new Set(words.map(word => getComputedStyle(word).borderBottomStyle))]"
    assert page.locator("mark.spam, .key.spam").evaluate_all(lines) == ["solid"]
    assert page.locator("mark.ham, .key.ham").evaluate_all(lines) == ["dotted"]
    width = "word => parseFloat(getComputedStyle(word).borderBottomWidth)"
    assert page.locator("mark", has_text="£100,000").evaluate(width) > page.locator("mark.ham").first.evaluate(width)
    expect_contrast(page)
    expect_slider_to_stand_out(page)
    context.close()


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


def test_a_busy_server_is_asked_again(page):
    page.route("**/explain", lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, body="<h1>busy"))
    page.get_by_label("Message").fill(SPAM)
    expect(page.get_by_role("alert")).to_have_text(
        "The server is busy. Your message stays here, and the page soon tries again."
    )
    expect(page.get_by_label("Message")).to_have_value(SPAM)
    expect(page.locator("#result")).to_be_hidden()
    page.unroute("**/explain")
    expect(page.locator("#verdict")).to_have_text("Spam")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_proxy_refuses_without_json(page):
    page.route("**/explain", lambda route: route.fulfill(status=413, body="<h1>too large"))
    page.get_by_label("Message").fill(SPAM)
    expect(page.get_by_role("alert")).to_have_text("The server refused the message: status 413.")


def test_fast_typing_asks_seldom(page):
    sent = []
    page.on(
        "request", lambda request: sent.append(json.loads(request.post_data)["text"]) if request.post_data else None
    )
    page.clock.install()
    page.clock.pause_at(time.time() + 60)
    box = page.get_by_label("Message")
    box.press_sequentially("a")
    page.clock.run_for(1)
    expect(page.locator("#message")).to_have_text("a")
    assert sent == ["a"], "the first letter waits"
    for letter in "bcdef":
        box.press_sequentially(letter)
        page.clock.run_for(10)
    assert sent == ["a"]
    page.clock.run_for(150)
    expect(page.locator("#message")).to_have_text("abcdef")
    assert sent == ["a", "abcdef"]


def test_a_server_that_does_not_tell_why(browser):
    with served(create_app(explains=False)) as server:
        page = browser.new_page()
        faults, asked = [], []
        page.on("pageerror", lambda error: faults.append(error))
        page.on("request", lambda request: asked.append(request.url.rsplit("/", 1)[-1]))
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.get_by_label("Message").fill(SPAM)
        expect(page.locator("#verdict")).to_have_text("Spam")
        expect(page.locator("#result")).to_contain_text("This server does not tell why: who knows which words count")
        expect(page.locator("#result h2")).to_have_count(0)
        page.get_by_role("slider").press("End")
        expect(page.locator("#verdict")).to_have_text("Ham")
        page.close()
        assert not faults
        assert "score" in asked
        assert "explain" not in asked


def test_without_javascript(browser, server):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator("noscript p")).to_contain_text("Without JavaScript the answer comes as JSON")
    expect(page.locator("button, input")).to_have_count(1 + page.locator("button[type=button], input").count())
    for control in page.locator("button[type=button], input").all():
        expect(control).to_be_hidden()
    page.get_by_label("Message").fill(SPAM)
    page.get_by_role("button", name="Score it").click()
    expect(page.locator("body")).to_contain_text('"prediction":true')
    context.close()
