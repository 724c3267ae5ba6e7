"""What the tests of pages share: a server of an application, and how colours are told apart."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from flask import Flask
from playwright.sync_api import Page
from werkzeug.serving import BaseWSGIServer, make_server


@contextlib.contextmanager
def served(app: Flask) -> Iterator[BaseWSGIServer]:
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


COLOURS = """(within) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const blend = (colours) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
    };
    const behind = (element) =>
        element ? [...behind(element.parentElement), getComputedStyle(element).backgroundColor] : [];
    const found = [];
    const all = [...document.querySelector(within).querySelectorAll("*")];
    for (const element of all.filter((element) => element.checkVisibility())) {
        const style = getComputedStyle(element), after = getComputedStyle(element, "::after");
        const around = behind(element.parentElement), inside = behind(element), card = behind(element.closest(".card"));
        const name = `${element.tagName} ${element.id || element.className} ${element.textContent.slice(0, 20)}`;
        const add = (kind, colour, beside) =>
            found.push({ name, kind, colour: blend([...beside, colour]), beside: blend(beside) });
        if (style.opacity < 1) throw Error(`faded: ${name}`);
        if ([...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()))
            add("text", style.color, inside);
        if (after.content !== "none") add("text", after.color, inside);
        if (element.matches("textarea")) {
            add("text", style.color, inside);
            add("text", getComputedStyle(element, "::placeholder").color, inside);
        }
        if (element.matches("textarea, input[type=password], button:not(.quiet), .meter, .alert"))
            for (const beside of [around, inside]) add("border", style.borderTopColor, beside);
        if (element.matches(".meter > *"))
            for (const beside of [around, card]) add("meter", style.backgroundColor, beside);
        if (element.matches(".meter > .mark")) add("gap", style.backgroundColor, [style.outlineColor]);
        if (element.matches("path:not(.grid)")) add("line", style.stroke, card);
        if (element.matches("textarea, button, input, a, [role=slider], summary")) {
            element.focus({ focusVisible: true });
            if (style.outlineStyle !== "solid") throw Error(`no focus ring: ${name}`);
            add("focus", style.outlineColor, around);
            element.blur();
        }
    }
    return found;
}"""


def contrast(one: Any, other: Any) -> float:
    """Return the contrast ratio of two colours, as WCAG 2.2 defines it."""
    colours = np.array([one, other])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (light + 0.05) / (dark + 0.05)


def expect_contrast(page: Page, within: str = "body") -> list[dict[str, Any]]:
    """Expect that what is shown within some element differs enough from what is beside it; return what was compared."""
    page.evaluate("Promise.all(document.getAnimations().map(animation => animation.finished))")
    found = page.evaluate(COLOURS, within)
    faint = {
        f"{entry['kind']} of {entry['name']}": ratio
        for entry in found
        if (ratio := contrast(entry["colour"], entry["beside"])) < (4.5 if entry["kind"] == "text" else 3)
    }
    assert faint == {}
    return found
