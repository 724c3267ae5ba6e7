"""Read the fields of a request, or answer in one sentence what is wrong with it."""

import json
import re
from typing import Any
from urllib.parse import parse_qsl

import orjson
from flask import abort, g, request
from werkzeug.exceptions import RequestEntityTooLarge

from engine.saved import check_threshold

SMALL_BODY = 2**11  # bytes; what is larger waits for its turn
LARGEST_BODY = 2**17  # bytes; the longest text takes 120,000 where each character is escaped as \ud83d\ude00
LARGEST_BATCH_BODY = 2**20  # bytes
LARGEST_BATCH = 1000  # texts
LONGEST_TEXT = 10_000  # characters; the longest SMS of many parts has 1,600
LONGEST_BATCH = 250_000  # characters of all texts; of the costliest ones the model scores so many in a second
MOST_FIELDS = 100  # of a form
MOST_VALUES = 12_000  # in JSON; a text may consist of commas
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
# float() takes more than people mean by a number: underscores, and the digits of every script.
NUMBER = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
DECODER = json.JSONDecoder(parse_int=float)  # int() takes a time that grows with the square of the digits


def read_body(largest: int = LARGEST_BODY) -> bytes:
    """Return the body of the request, of at most `largest` bytes; 400, 413 or 415 where that cannot be."""
    if request.mimetype not in FORMS and not request.is_json:
        abort(415, "send JSON (Content-Type: application/json) or a form")
    length = request.environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdecimal() and len(length) < 20):
        abort(400, "Content-Length must be a whole number of bytes")
    # One byte more than is allowed: Werkzeug cuts a body of unstated length off there without a word.
    request.max_content_length = largest + 1
    if int(length) > largest or len(body := request.get_data()) > largest:
        abort(413, f"the body is larger than {largest} bytes")
    g.body_is_read = True
    return body


def parse_fields(body: bytes) -> dict[str, Any]:
    """Return the fields of the JSON object or form that a body holds; 400 or 413 where it does not."""
    if request.mimetype not in FORMS:
        return parse_json(body)
    try:
        if request.mimetype == "multipart/form-data":
            request.max_form_parts = MOST_FIELDS
            return request.form.to_dict()
        if body.count(b"&") < MOST_FIELDS:
            return dict(reversed(parse_qsl(body.decode(), keep_blank_values=True, errors="strict")))
    except ValueError as error:
        abort(400, f"the body is not a valid form: {error}")
    except RequestEntityTooLarge:
        pass
    abort(413, f"a form has at most {MOST_FIELDS} fields")


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the fields of a JSON object; 400 where it is none, 413 where it holds too much."""
    # Each value has one of these before it. Texts hold them as well, but few messages many of them.
    if len(body) > MOST_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        abort(413, f"the body has more than {MOST_VALUES} commas and opening brackets")
    try:
        fields = orjson.loads(body)
    except ValueError:  # or UTF-16, or a text that ends within a pair of surrogates, which Python's own library takes
        try:
            fields = DECODER.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
        except (ValueError, RecursionError) as error:
            abort(400, f"the body is not valid JSON: {error}")
    if not isinstance(fields, dict):
        abort(400, 'the body must be a JSON object, such as {"text": "..."}')
    return fields


def read_message(fields: dict[str, Any], default: float) -> tuple[str, float]:
    """Return the text and the threshold of a request; 400 where they are not right, 413 where the text is too long."""
    if "text" not in fields:
        abort(400, "text is missing")
    if not isinstance(fields["text"], str):
        abort(400, "text must be a string")
    refuse_long(fields["text"])
    return fields["text"], read_threshold(fields, default)


def read_batch(fields: dict[str, Any], default: float) -> tuple[list[str], float]:
    """Return the texts and the threshold of a batch; 400 where they are not right, 413 where the texts are too much."""
    if "texts" not in fields:
        abort(400, "texts is missing")
    texts = fields["texts"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        abort(400, "texts must be a JSON array of strings")
    if len(texts) > LARGEST_BATCH:
        abort(413, f"a batch holds at most {LARGEST_BATCH} texts, not {len(texts)}")
    for text in texts:
        refuse_long(text)
    if (characters := sum(map(len, texts))) > LONGEST_BATCH:
        abort(413, f"the texts of a batch have at most {LONGEST_BATCH} characters, not {characters}")
    return texts, read_threshold(fields, default)


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
