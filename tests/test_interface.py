"""The interface of app.py: what each endpoint answers, and what it says of bad input."""

import contextlib
import io
import json
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import HAM, SPAM, LengthModel, stub_card
from sklearn.base import BaseEstimator
from werkzeug.test import encode_multipart

from app import create_app
from engine.fields import LARGEST_BATCH, LARGEST_BODY, LONGEST_BATCH, LONGEST_TEXT, SMALL_BODY, read_threshold
from engine.shortcut import Shortcut
from engine.work import DEADLINE
from score import explain, load_card, load_model, score

SPAM, HAM = SPAM[0], HAM[0]
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def model():
    """The saved model."""
    return load_model()


@pytest.fixture(scope="module")
def client(model):
    """A client of the application with the saved model."""
    return create_app(model).test_client()


@pytest.fixture
def stub_client():
    """A client of the application with the stub."""
    return create_app(LengthModel(), stub_card(threshold=0.2)).test_client()


@pytest.mark.parametrize(
    "threshold", [None, 0, 1, 0.5, 1e-05, "0.5", "1", ".25", "1e-05", " 0.5 ", "1E-3", "1.", "+0.5", "1e0"]
)
def test_threshold(client, model, threshold):
    fields = {"text": SPAM} if threshold is None else {"text": SPAM, "threshold": threshold}
    used = load_card()["threshold"] if threshold is None else float(threshold)
    prediction, propensity = score(SPAM, model, used)
    expected = {"prediction": prediction, "propensity": propensity, "threshold": used}
    assert client.post("/score", json=fields).json == expected
    assert client.post("/score", data=fields).json == expected


@pytest.mark.parametrize("text", [SPAM, HAM, "", "£ \u2028 \x00 \U0001f600"])
@pytest.mark.parametrize("content_type", [JSON, f"{JSON}; charset=utf-8", FORM, "multipart/form-data"])
def test_text(client, model, text, content_type):
    data = json.dumps({"text": text}) if content_type.startswith(JSON) else {"text": text}
    response = client.post("/score", data=data, content_type=content_type)
    prediction, propensity = score(text, model, load_card()["threshold"])
    assert response.status_code == 200
    assert (response.json["prediction"], response.json["propensity"]) == (prediction, propensity)


@pytest.mark.parametrize("content_type", [JSON, "Application/JSON; charset=utf-8"])
@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"text": SPAM}),
        json.dumps({"text": "£ \u2028", "threshold": 0.25}),
        json.dumps({"text": SPAM}).encode("utf-16"),
        "",
        "{",
        "[]",
        '{"text": 5}',
        '{"text": "free", "threshold": "0_1"}',
        json.dumps({"text": "x" * (LONGEST_TEXT + 1)}),
        json.dumps({"text": ""}).ljust(SMALL_BODY),
        json.dumps({"text": ""}).ljust(SMALL_BODY + 1),
        " " * (LARGEST_BODY + 1),
    ],
)
def test_the_shortcut_answers_as_flask_does(client, monkeypatch, body, content_type):
    post = {"path": "/score", "data": body, "content_type": content_type}
    short = client.post(**post)
    monkeypatch.setattr(Shortcut, "is_for", lambda *_: False)
    long = client.post(**post)
    assert (short.status, short.data) == (long.status, long.data)
    assert sorted(short.headers) == sorted(long.headers)


@pytest.mark.parametrize("content_type", [JSON, f"{JSON}; charset=utf-8"])
def test_the_shortcut_is_taken(client, monkeypatch, content_type):
    monkeypatch.setattr(client.application, "full_dispatch_request", lambda: pytest.fail("through Flask"))
    assert client.post("/score", data='{"text": "x"}', content_type=content_type).status_code == 200


def test_a_message_is_scored_once_on_an_error():
    calls = []

    class Broken(BaseEstimator):
        def predict_proba(self, texts):
            calls.append(texts)
            if texts != [""]:
                raise RuntimeError("broken inside")
            return np.array([[1.0, 0.0]])

    client = create_app(Broken(), stub_card()).test_client()
    assert client.post("/score", json={"text": "x"}).status_code == 500
    assert calls == [[""], ["x"]]


def test_any_estimator_can_be_served(stub_client):
    assert stub_client.post("/score", json={"text": "x" * 20}).json == {
        "prediction": True,
        "propensity": 0.2,
        "threshold": 0.2,
    }
    assert stub_client.post("/explain", json={"text": "x"}).json["contributions"] is None


def test_score_batch(client, model):
    texts = [SPAM, HAM, ""] * 300
    answer = client.post("/score/batch", json={"texts": texts, "threshold": 0.4}).json
    assert answer["threshold"] == 0.4
    assert [(result["prediction"], result["propensity"]) for result in answer["results"]] == [
        score(text, model, 0.4) for text in texts
    ]
    assert client.post("/score/batch", json={"texts": []}).json["results"] == []


def test_explain(client, model):
    answer = client.post("/explain", json={"text": SPAM, "threshold": 0.4}).json
    prediction, propensity = score(SPAM, model, 0.4)
    assert answer == {
        "prediction": prediction,
        "propensity": propensity,
        "threshold": 0.4,
        "contributions": explain(SPAM, model),
    }


@pytest.mark.parametrize("path", ["/score", "/explain"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"text": "free", "threshold": 1e}', "not valid JSON"),
        ("[" * 10_000, "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ('"free"', "must be a JSON object"),
        ("{}", "text is missing"),
        ('{"message": "free"}', "text is missing"),
        ('{"text": null}', "text must be a string"),
        ('{"text": 5}', "text must be a string"),
        ('{"text": ["free"]}', "text must be a string"),
        ('{"text": "free", "threshold": null}', "threshold must be a number"),
        ('{"text": "free", "threshold": true}', "threshold must be a number"),
        ('{"text": "free", "threshold": [0.5]}', "threshold must be a number"),
        ('{"text": "free", "threshold": "high"}', "threshold must be a number"),
        ('{"text": "free", "threshold": ""}', "threshold must be a number"),
        ('{"text": "free", "threshold": "0_1"}', "threshold must be a number"),
        ('{"text": "free", "threshold": "\u0661"}', "threshold must be a number"),
        ('{"text": "free", "threshold": "nan"}', "threshold must be a number"),
        ('{"text": "free", "threshold": "1.5"}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": "1e999"}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": 1.5}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": -1e-9}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": NaN}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": Infinity}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": ' + "9" * 5000 + "}", "threshold must be between 0 and 1"),
    ],
)
def test_bad_json(client, path, body, message):
    response = client.post(path, data=body, content_type="application/json")
    assert response.status_code == 400
    assert list(response.json) == ["error"]
    assert message in response.json["error"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "text is missing"),
        ({"text": "free", "threshold": "high"}, "threshold must be a number"),
        ({"text": "free", "threshold": "2"}, "threshold must be between 0 and 1"),
    ],
)
def test_bad_form(client, fields, message):
    response = client.post("/score", data=fields, content_type=FORM)
    assert response.status_code == 400
    assert message in response.json["error"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, "texts is missing"),
        ({"texts": "free"}, 400, "texts must be a JSON array"),
        ({"texts": ["free", 5]}, 400, "texts must be a JSON array"),
        ({"texts": ["free"], "threshold": 2}, 400, "threshold must be between"),
        ({"texts": [""] * 1001}, 413, "at most 1000 texts, not 1001"),
    ],
)
def test_bad_batch(client, fields, status, message):
    response = client.post("/score/batch", json=fields)
    assert response.status_code == status
    assert message in response.json["error"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/score", lambda text: {"json": {"text": text}}),
        ("/score", lambda text: {"data": {"text": text}}),
        ("/score/batch", lambda text: {"json": {"texts": [HAM, text]}}),
        ("/explain", lambda text: {"json": {"text": text}}),
    ],
)
def test_longest_text(client, path, fields):
    assert client.post(path, **fields("€" * 10_000)).status_code == 200
    response = client.post(path, **fields("€" * 10_001))
    assert response.status_code == 413
    assert response.json == {"error": "a text has at most 10000 characters, not 10001"}


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "application/jsonp", None])
@pytest.mark.parametrize("path", ["/score", "/score/batch", "/explain"])
def test_unsupported_media_type(client, path, content_type):
    response = client.post(path, data='{"text": "free"}', content_type=content_type)
    assert response.status_code == 415
    assert "application/json" in response.json["error"]


@pytest.mark.parametrize("content_type", ["application/json", FORM, "multipart/form-data; boundary=x"])
def test_too_large(client, content_type):
    response = client.post("/score", data=b" " * (LARGEST_BODY + 1), content_type=content_type)
    assert response.status_code == 413
    assert response.json == {"error": "the body is larger than 131072 bytes"}


def test_largest_body(client):
    body = json.dumps({"text": ""})
    response = client.post("/score", data=body + " " * (LARGEST_BODY - len(body)), content_type="application/json")
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "body", "filler"),
    [
        ("application/json", b'{"text": "free"}', b" "),
        (FORM, b"text=free&rest=", b"x"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\nfree\r\n--x--\r\n',
            b" ",
        ),
    ],
)
@pytest.mark.parametrize(("size", "status"), [(LARGEST_BODY, 200), (LARGEST_BODY + 1, 413)])
def test_large_body_in_chunks(client, content_type, body, filler, size, status):
    body += filler * (size - len(body))
    # Given in another way, the client would state the length.
    chunked = {"CONTENT_TYPE": content_type, "wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True}
    response = client.post("/score", environ_overrides=chunked)
    assert response.status_code == status, response.text


@pytest.mark.parametrize("rest", [{"rest": "x" * 130_000}, {f"rest{i}": "" for i in range(90)}])
def test_large_multipart_form(client, rest):
    boundary, body = encode_multipart({"text": HAM, **rest})
    content_type = f"multipart/form-data; boundary={boundary}"
    response = client.post("/score", data=body, content_type=content_type)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("content_type", [JSON, FORM])
@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1_0", "x", "\u0661"])
def test_content_length_that_is_no_number(client, content_type, length):
    environ = {"CONTENT_LENGTH": length, "CONTENT_TYPE": content_type, "wsgi.input": io.BytesIO(b"{}")}
    response = client.post("/score", environ_overrides=environ)
    assert response.status_code == 400
    assert response.json == {"error": "Content-Length must be a whole number of bytes"}


@pytest.mark.parametrize("path", ["/score", "/score/batch", "/explain"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_wrong_method(client, path, method):
    response = client.open(path, method=method)
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"]
    assert list(response.json) == ["error"]


@pytest.mark.parametrize("path", ["/scores", "/score/", "/static/nothing.css", "/../app.py", "/static/../app.py"])
def test_unknown_path(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert list(response.json) == ["error"]


@pytest.mark.parametrize("fields", [{"data": {"text": "my secret"}}, {"json": {"text": "my secret"}}])
def test_a_fault_shows_no_stack_trace(caplog, fields):
    class Broken(BaseEstimator):
        def predict_proba(self, texts):
            if texts != [""]:
                raise RuntimeError("broken inside")
            return np.array([[1.0, 0.0]])

    response = create_app(Broken(), stub_card()).test_client().post("/score", **fields)

    assert list(response.json) == ["error"]
    assert response.status_code == 500
    assert "broken" not in response.text
    assert "Traceback" not in response.text
    assert "broken inside" in caplog.text
    assert "my secret" not in caplog.text


def test_batches_are_scored_in_turn():
    meeting, met = threading.Barrier(2), []

    class Meeting(BaseEstimator):
        def predict_proba(self, texts):
            if texts != [""]:
                with contextlib.suppress(threading.BrokenBarrierError):
                    met.append(meeting.wait(timeout=1))
            return np.full((len(texts), 2), 0.5)

    client = create_app(Meeting(), stub_card()).test_client

    with ThreadPoolExecutor() as pool:
        posts = [pool.submit(client().post, "/score/batch", json={"texts": [text]}) for text in "ab"]
        assert [post.result().status_code for post in posts] == [200, 200]
    assert met == []


def test_a_model_that_cannot_score_is_not_served():
    with pytest.raises(TypeError, match="model must be a fitted estimator"):
        create_app(object())


@pytest.mark.parametrize(
    "metrics", [None, {}, {"test": None}, [], "none", {"test": {"aucpr": 0.9}}, {"test": {"today": {"aucpr": 0.9}}}]
)
def test_page_of_a_card_without_metrics(metrics):
    response = create_app(LengthModel(), stub_card(metrics=metrics)).test_client().get("/")
    assert response.status_code == 200
    assert "AUCPR" not in response.text


@pytest.mark.parametrize(
    ("used", "threshold", "price"), [("cost", 0.75, "costs\\s+3 times"), ("precision", 0.75, None)]
)
def test_page_names_the_price_only_where_it_is_used(used, threshold, price):
    card = stub_card(threshold=threshold, thresholds={"used": used, "cost": 0.75, "precision": 0.75})
    page = create_app(LengthModel(), card).test_client().get("/").text
    assert re.search(price, page) if price else "follows from a price" not in page


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    for link in re.findall(r'(?:src|href)="([^"]+)"', response.text):
        with client.get(f"/{link}".replace("/.", "/")) as linked:
            assert linked.status_code == 200, link


def test_health(client):
    card = load_card()
    assert client.get("/health").json == {"status": "ok", "model": card["name"], "sha256": card["sha256"]}


def test_openapi_describes_every_path(client):
    documented = {
        (path, method.upper())
        for path, operations in client.get("/openapi.json").json["paths"].items()
        for method in operations
    }
    served = {
        (rule.rule, method)
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.endpoint != "static"
    }
    assert documented == served


def test_openapi_states_the_limits_in_use(client):
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    assert schemas["Batch"]["properties"]["texts"]["maxItems"] == LARGEST_BATCH
    assert schemas["Text"]["maxLength"] == LONGEST_TEXT
    assert f"{LONGEST_BATCH:,} characters" in schemas["Batch"]["properties"]["texts"]["description"]
    page = client.get("/docs").text
    assert f"{LARGEST_BODY // 1024} KiB" in page
    assert f"within {DEADLINE} seconds" in page


@pytest.mark.parametrize("number", ["0.5", "0", "-0", "1", "1.", "+.5", "1E-3", "1e0", "9.9e-01", " 00.10\n"])
def test_openapi_describes_numbers_in_strings(client, number):
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    assert re.search(schemas["NumberInString"]["pattern"], number)
    assert read_threshold({"threshold": number}, 0.5) == float(number)


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", FORM])
def test_texts_are_not_logged(client, caplog, capfd, content_type):
    caplog.set_level(logging.DEBUG)
    for body in ('{"text": "my secret"}', '{"text": "my secret', '{"text": ["my secret"]}', "text=my+secret"):
        client.post("/score", data=body, content_type=content_type)
    assert "secret" not in caplog.text
    assert "secret" not in "".join(capfd.readouterr())
