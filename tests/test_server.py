"""Tests of app.py: bad input of every kind, what is counted and logged, and the production server at work."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from sklearn.base import BaseEstimator
from werkzeug.test import encode_multipart

import app as service
from score import explain, load_card, load_model, score

ROOT = Path(__file__).resolve().parents[1]
SPAM = "URGENT! You have won a £1000 prize. Call 09061701461 to claim"
HAM = "Sorry, I'll call you later, I'm in a meeting"
UNFINISHED = (
    b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
)
FORM = "application/x-www-form-urlencoded"


class LengthModel(BaseEstimator):
    """A stub whose propensity is the length of the text in percent."""

    def predict_proba(self, texts):
        share = np.minimum([len(text) / 100 for text in texts], 1)
        return np.column_stack([1 - share, share])


@pytest.fixture(scope="module")
def model():
    """The saved model."""
    return load_model()


@pytest.fixture
def client(model):
    """A client of the application with the saved model."""
    return service.create_app(model).test_client()


@pytest.fixture
def stub_client():
    """A client of the application with the stub."""
    card = {"name": "stub", "sha256": "0", "threshold": 0.2, "operating_points": []}
    return service.create_app(LengthModel(), card).test_client()


@contextlib.contextmanager
def launched(*command, host="127.0.0.1", **environment):
    """Run a server and give its process and address; leave nothing of it behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [part.format(port=port) for part in command or (sys.executable, str(ROOT / "app.py"))],
        cwd=ROOT,
        env={**os.environ, "PORT": str(port), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    url = f"http://{host}:{port}"
    try:
        poll(lambda: process.poll() is not None or answers(url), "the server to answer")
        assert process.poll() is None, process.stdout.read()
        yield process, url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for folder in metric_folders(process):
            shutil.rmtree(folder)


def answers(url: str) -> bool:
    """Tell whether a server answers."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/health", timeout=1).ok
    return False


def accepts_connections(url: str) -> bool:
    """Tell whether a server accepts a connection."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0


def poll(condition, what: str, seconds: float = 30):
    """Wait until a condition holds and return it, or fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    pytest.fail(f"waited {seconds} s in vain for {what}")


def children(process: subprocess.Popen) -> list[int]:
    """Return the process ids of the workers of a server."""
    return [
        int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def metric_folders(process: subprocess.Popen) -> list[Path]:
    """Return the folders that a server counts into."""
    return list(Path("/dev/shm").glob(f"spam-metrics-{process.pid}-*"))


def counted(exposition: str, sample: str) -> float:
    """Return the value of a sample in what /metrics answers, 0 where it is not there."""
    match = re.search(rf"^{re.escape(sample)} (.*)$", exposition, re.MULTILINE)
    return float(match[1]) if match else 0


# The interface


@pytest.mark.parametrize(
    "threshold",
    [None, 0, 1, 0.5, 1e-05, *("0.5", "0", "1", "1.0", ".25", "1e-05", " 0.5 ", "1E-3", "1.", "+0.5", "1e0")],
)
@pytest.mark.parametrize("text", [SPAM, HAM, "", "£ \u2028 \x00 \U0001f600"])
@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", FORM, "form-data"]
)
def test_score(client, model, text, threshold, content_type):
    fields = {"text": text} if threshold is None else {"text": text, "threshold": threshold}
    if content_type.startswith("application/json"):
        response = client.post("/score", data=json.dumps(fields), content_type=content_type)
    else:
        content_type = "multipart/form-data" if content_type == "form-data" else FORM
        response = client.post("/score", data=fields, content_type=content_type)
    used = load_card()["threshold"] if threshold is None else float(threshold)
    prediction, propensity = score(text, model, used)
    assert response.status_code == 200
    assert response.json == {"prediction": prediction, "propensity": propensity, "threshold": used}


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
        ("[" * 100_000, "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        ('{"text": "free", "threshold": ' + "9" * 5000 + "}", "not valid JSON"),
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
        ('{"text": "free", "threshold": "1.5"}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": "nan"}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": "1e999"}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": 1.5}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": -1e-9}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": NaN}', "threshold must be between 0 and 1"),
        ('{"text": "free", "threshold": Infinity}', "threshold must be between 0 and 1"),
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
    response = client.post("/score", data=b" " * (2**20 + 1), content_type=content_type)
    assert response.status_code == 413
    assert response.json == {"error": "the body is larger than 1048576 bytes"}


def test_largest_body(client):
    body = json.dumps({"text": ""})
    response = client.post("/score", data=body + " " * (2**20 - len(body)), content_type="application/json")
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
@pytest.mark.parametrize(("size", "status"), [(2**20 - 1, 200), (2**20 + 1, 413)])
def test_large_body_in_chunks(client, content_type, body, filler, size, status):
    body += filler * (size - len(body))
    # Given in another way, the client would state the length.
    chunked = {"CONTENT_TYPE": content_type, "wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True}
    response = client.post("/score", environ_overrides=chunked)
    assert response.status_code == status, response.text


@pytest.mark.parametrize("rest", [{"rest": "x" * 1_000_000}, {f"rest{i}": "" for i in range(2000)}])
def test_large_multipart_form(client, rest):
    boundary, body = encode_multipart({"text": HAM, **rest})
    content_type = f"multipart/form-data; boundary={boundary}"
    response = client.post("/score", data=body, content_type=content_type)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", ["/score", "/score/batch", "/explain"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_wrong_method(client, path, method):
    response = client.open(path, method=method)
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"]
    assert list(response.json) == ["error"]


@pytest.mark.parametrize(
    "path", ["/scores", "/score/", "/static/nothing.css", "/../app.py", "/static/../app.py"]
)
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

    card = {"name": "broken", "sha256": "0", "threshold": 0.5, "operating_points": []}
    response = service.create_app(Broken(), card).test_client().post("/score", **fields)
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

    card = {"name": "meeting", "sha256": "0", "threshold": 0.5, "operating_points": []}
    client = service.create_app(Meeting(), card).test_client
    with ThreadPoolExecutor() as pool:
        posts = [pool.submit(client().post, "/score/batch", json={"texts": [text]}) for text in "ab"]
        assert [post.result().status_code for post in posts] == [200, 200]
    assert met == []


def test_a_model_that_cannot_score_is_not_served():
    with pytest.raises(TypeError, match="model must be a fitted estimator"):
        service.create_app(object())


@pytest.mark.parametrize("metrics", [None, {}, {"test": None}, [], "none"])
def test_page_of_a_card_without_metrics(metrics):
    card = {"name": "stub", "sha256": "0", "threshold": 0.5, "operating_points": [], "metrics": metrics}
    response = service.create_app(LengthModel(), card).test_client().get("/")
    assert response.status_code == 200
    assert "AUCPR" not in response.text


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert response.mimetype == "text/html"
    assert response.headers["Content-Security-Policy"] == "default-src 'self'"
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
    assert schemas["Batch"]["properties"]["texts"]["maxItems"] == service.LARGEST_BATCH
    assert schemas["Text"]["maxLength"] == service.LONGEST_TEXT


@pytest.mark.parametrize("number", ["0.5", "0", "-0", "1", "1.", "+.5", "1E-3", "1e0", "9.9e-01", " 00.10\n"])
def test_openapi_describes_numbers_in_strings(client, number):
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    assert re.search(schemas["NumberInString"]["pattern"], number)
    assert service.read_threshold({"threshold": number}, 0.5) == float(number)


def test_metrics(stub_client):
    before = stub_client.get("/metrics").text
    stub_client.post("/score", json={"text": "x" * 35})
    stub_client.post("/score", data={"text": "x" * 85})
    stub_client.post("/score/batch", json={"texts": ["x"] * 5})
    stub_client.post("/score", json={})
    stub_client.open("/score", method="MADEUP")
    stub_client.get("/made/up")
    after = stub_client.get("/metrics").text
    growth = {
        'http_requests_total{method="POST",path="/score",status="200"}': 2,
        'http_requests_total{method="POST",path="/score/batch",status="200"}': 1,
        'http_requests_total{method="POST",path="/score",status="400"}': 1,
        'http_requests_total{method="other",path="/score",status="405"}': 1,
        'http_requests_total{method="GET",path="other",status="404"}': 1,
        'http_request_duration_seconds_count{path="/score"}': 4,
        'spam_predictions_total{prediction="spam"}': 2,
        'spam_predictions_total{prediction="ham"}': 5,
        'spam_propensity_bucket{le="0.4"}': 6,
        "spam_propensity_count": 7,
    }
    assert {sample: counted(after, sample) - counted(before, sample) for sample in growth} == growth
    assert counted(after, 'spam_model_info{name="stub",sha256="0"}') == 1
    assert "made" not in after.lower()


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", FORM])
def test_texts_are_not_logged(client, caplog, capfd, content_type):
    caplog.set_level(logging.DEBUG)
    for body in ('{"text": "my secret"}', '{"text": "my secret', '{"text": ["my secret"]}', "text=my+secret"):
        client.post("/score", data=body, content_type=content_type)
    assert "secret" not in caplog.text
    assert "secret" not in "".join(capfd.readouterr())


# The production server


@pytest.fixture(scope="module")
def server():
    """The address of a production server with two workers."""
    with launched(WORKERS="2") as (_, url):
        yield url


def test_schemathesis(server, tmp_path):
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.negative_data_rejection]\nexpected-statuses = ["400", "405", "413", "415"]\n'
    )
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server}/openapi.json"),
        *("--seed", "1", "--max-examples", "50", "--phases", "examples,coverage,fuzzing"),
        *("--request-timeout", "10", "--no-color"),
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[:4000] + run.stderr[-2000:]
    assert "No issues found" in run.stdout


def test_workers_count_together(server):
    sample = 'http_requests_total{method="POST",path="/score",status="200"}'
    before = counted(requests.get(f"{server}/metrics", timeout=5).text, sample)
    for _ in range(40):  # each on a connection of its own, so that both workers get some
        assert requests.post(f"{server}/score", json={"text": HAM}, timeout=5).ok
    for _ in range(6):
        assert counted(requests.get(f"{server}/metrics", timeout=5).text, sample) == before + 40


@pytest.mark.parametrize(("texts", "status"), [(104, 200), (105, 413)])
def test_large_body_on_the_server(server, texts, status):
    response = requests.post(f"{server}/score/batch", json={"texts": ["x " * 5000] * texts}, timeout=10)
    assert response.status_code == status


@pytest.mark.parametrize(("kilobytes", "status"), [(1, 200), (1049, 413)])
def test_body_of_unstated_length(server, kilobytes, status):
    chunks = [b'{"text": "free"}', *[b" " * 1000] * kilobytes]
    headers = {"Content-Type": "application/json"}
    response = requests.post(f"{server}/score", data=iter(chunks), headers=headers, timeout=10)
    assert response.status_code == status, response.text


def test_slow_clients_do_not_hold_up_others(server):
    address = ("127.0.0.1", int(server.rsplit(":", 1)[1]))
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(address)).sendall(UNFINISHED)
        for _ in range(20):
            assert requests.post(f"{server}/score", json={"text": HAM}, timeout=5).ok


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stop_under_load(stop):
    statuses, early_errors = [], []
    stopping = threading.Event()

    def send(url: str) -> None:
        with requests.Session() as session:
            while not stopping.is_set():
                try:
                    statuses.append(session.post(f"{url}/score", json={"text": SPAM}, timeout=10).status_code)
                except requests.ConnectionError as error:
                    if not stopping.is_set():
                        early_errors.append(error)

    with launched(WORKERS="2") as (process, url):
        workers = children(process)
        assert len(workers) == 2
        assert metric_folders(process)
        threads = [threading.Thread(target=send, args=(url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        poll(lambda: len(statuses) > 200 or early_errors, "200 answers")
        begun = time.monotonic()
        stopping.set()
        process.send_signal(stop)
        log, _ = process.communicate(timeout=10)
        seconds = time.monotonic() - begun
        for thread in threads:
            thread.join()
        assert process.returncode == 0, log
        assert seconds < 2
        assert not early_errors
        assert set(statuses) == {200}
        assert log.count("\n") == 1, log
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
        assert not metric_folders(process)


def test_a_request_in_flight_is_answered_before_the_server_ends(tmp_path):
    program = f"""
import pathlib, time, numpy, app, sklearn.base
class Held(sklearn.base.BaseEstimator):
    def predict_proba(self, texts):
        if texts == ["held"]:
            pathlib.Path({str(tmp_path)!r}, "begun").touch()
            while not pathlib.Path({str(tmp_path)!r}, "released").exists():
                time.sleep(0.01)
        return numpy.array([[0.25, 0.75]] * len(texts))
card = {{"name": "held", "sha256": "0", "threshold": 0.5, "operating_points": []}}
app.load_app = lambda: app.create_app(Held(), card)
app.serve()
"""
    answers_got = []
    with launched(sys.executable, "-c", program.replace("{", "{{").replace("}", "}}"), WORKERS="1") as (
        process,
        url,
    ):
        thread = threading.Thread(
            target=lambda: answers_got.append(
                requests.post(f"{url}/score", json={"text": "held"}, timeout=10).json()
            )
        )
        thread.start()
        poll((tmp_path / "begun").exists, "the request to begin")
        process.terminate()
        poll(lambda: not accepts_connections(url), "the server to begin its end")
        (tmp_path / "released").touch()
        log, _ = process.communicate(timeout=10)
        thread.join()
    assert answers_got == [{"prediction": True, "propensity": 0.75, "threshold": 0.5}]
    assert process.returncode == 0, log


def test_a_stalled_client_does_not_hold_up_the_end():
    with launched(WORKERS="1") as (process, url):
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as stalled:
            stalled.sendall(UNFINISHED)
            assert requests.post(f"{url}/score", json={"text": HAM}, timeout=5).ok
            begun = time.monotonic()
            process.terminate()
            process.wait(timeout=30)
            # A slow batch that the server has yet to answer is given 5 s, and it cannot tell the two apart.
            assert 4 < time.monotonic() - begun < 8
        assert process.returncode == 0
        assert not metric_folders(process)


def test_a_lost_worker_is_replaced():
    with launched(WORKERS="2") as (process, url):
        lost = children(process)[0]
        os.kill(lost, signal.SIGKILL)
        poll(lambda: len(set(children(process)) - {lost}) == 2, "a new worker")
        poll(lambda: answers(url), "the server to answer")
        assert requests.post(f"{url}/score", json={"text": HAM}, timeout=5).ok


def assert_refuses_to_serve(message, **environment):
    """Check that the server ends at once with a message and no stack trace."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "app.py"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        log, _ = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for folder in metric_folders(process):
            shutil.rmtree(folder)
    assert process.returncode == 1
    assert log.startswith("Cannot serve")
    assert message in log
    assert "Traceback" not in log


def test_a_port_in_use_is_refused(server):
    assert_refuses_to_serve("Address already in use", PORT=server.rsplit(":", 1)[1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "http", "PORT must be a positive whole number, not 'http'"),
        ("PORT", "0", "PORT must be a positive whole number"),
        ("PORT", "70000", "port must be 0-65535"),
        ("WORKERS", "-1", "WORKERS must be a positive whole number"),
        ("HOST", "no.such.host.", "no.such.host."),
    ],
)
def test_a_bad_environment_is_refused(name, value, message):
    assert_refuses_to_serve(message, **{name: value})


@pytest.mark.parametrize(("host", "shown"), [("localhost", "127.0.0.1"), ("", "127.0.0.1"), ("::1", "[::1]")])
def test_host(host, shown):
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with launched(HOST=host, WORKERS="1", host=shown) as (process, url):
        assert process.stdout.readline().startswith(f"Serving on {url} with 1 worker")


def test_flask_run():
    command = (sys.executable, "-m", "flask", "--app", "app", "run", "--port", "{port}")
    with launched(*command) as (_, url):
        assert requests.post(f"{url}/score", json={"text": HAM}, timeout=5).json()["prediction"] is False
