"""Read the fields of a request, or answer in one sentence what is wrong with it."""

import json
import re
from typing import Any

from flask import abort, request

from engine.saved import check_threshold

LARGEST_BODY = 2**20  # bytes
LARGEST_BATCH = 1000  # texts
LONGEST_TEXT = 10_000  # characters; the longest SMS of many parts has 1,600
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
# float() takes more than people mean by a number: underscores, and the digits of every script.
NUMBER = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


def read_fields() -> dict[str, Any]:
    """Return the fields of the request's JSON object or form; 400, 413 or 415 where that cannot be."""
    is_form = request.mimetype in FORMS
    if not is_form and not request.is_json:
        abort(415, "send JSON (Content-Type: application/json) or a form")
    length = request.environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdecimal() and len(length) < 20):
        abort(400, "Content-Length must be a whole number of bytes")
    body = request.get_data()
    if len(body) > LARGEST_BODY:
        abort(413)
    return request.form.to_dict() if is_form else parse_json(body)


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object; 400 where it is none."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        abort(400, f"the body is not valid JSON: {error}")
    if not isinstance(fields, dict):
        abort(400, 'the body must be a JSON object, such as {"text": "..."}')
    return fields


def read_text(fields: dict[str, Any]) -> str:
    """Return the text of a request; 400 where there is none, 413 where it is too long."""
    if "text" not in fields:
        abort(400, "text is missing")
    if not isinstance(fields["text"], str):
        abort(400, "text must be a string")
    refuse_long(fields["text"])
    return fields["text"]


def read_texts(fields: dict[str, Any]) -> list[str]:
    """Return the texts of a batch; 400 where there are none, 413 where they are too many or too long."""
    if "texts" not in fields:
        abort(400, "texts is missing")
    texts = fields["texts"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        abort(400, "texts must be a JSON array of strings")
    if len(texts) > LARGEST_BATCH:
        abort(413, f"a batch holds at most {LARGEST_BATCH} texts, not {len(texts)}")
    for text in texts:
        refuse_long(text)
    return texts


def refuse_long(text: str) -> None:
    """Answer 413 if a text is longer than the service scores."""
    if len(text) > LONGEST_TEXT:
        abort(413, f"a text has at most {LONGEST_TEXT} characters, not {len(text)}")


def read_threshold(fields: dict[str, Any], default: float) -> float:
    """Return the threshold of a request, by default the model's own; 400 where it is not in [0, 1]."""
    threshold = fields.get("threshold", default)
    if isinstance(threshold, str):
        if not NUMBER.fullmatch(threshold):
            abort(400, "threshold must be a number between 0 and 1")
        threshold = float(threshold)
    try:
        check_threshold(threshold)
    except (TypeError, ValueError) as error:
        abort(400, str(error))
    return float(threshold)
