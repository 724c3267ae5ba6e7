"""Serve the trained model over HTTP: JSON for programs, metrics for operators, a page for people.

`python app.py` runs a production server; HOST, PORT and WORKERS in the environment set its address (0.0.0.0
for all interfaces), its port and its number of processes. `flask --app app run` runs Flask's own server.

The production server waits for the body of a request as long as its client likes. On the open internet it
belongs behind a proxy that limits that time, or stalled clients, 256 for each worker, keep everyone else out.
"""

import io
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import joblib
from flask import Flask, Response, abort, render_template, request
from granian import Granian
from granian.constants import Interfaces
from granian.log import LogLevels
from sklearn.base import BaseEstimator
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from score import check_threshold, explain, load_card, load_model, score, score_batch

LARGEST_BODY = 2**20  # bytes
LARGEST_BATCH = 1000  # texts
LONGEST_TEXT = 10_000  # characters; the longest SMS of many parts has 1,600
THREADS = 256  # of each worker: a slow client occupies one until its request has come in
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Metrics:
    """What the service counts, in the form that Prometheus reads.

    With PROMETHEUS_MULTIPROC_DIR in the environment, each process counts into files of its own in that
    folder, and any of them answers with the sum; without, each has its own counts.
    """

    def __init__(self, card: dict[str, Any]):
        # Imported here, because the library looks for that folder when it is imported, and serve() makes it.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        requests = Counter(
            "http_requests", "Requests answered.", ("method", "path", "status"), registry=self.registry
        )
        seconds = Histogram(
            "http_request_duration_seconds",
            "Time to answer a request.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        predictions = Counter(
            "spam_predictions", "Texts scored, by prediction.", ("prediction",), registry=self.registry
        )
        self.predictions = {True: predictions.labels("spam"), False: predictions.labels("ham")}
        self.propensity = Histogram(
            "spam_propensity",
            "Propensities of the texts scored.",
            buckets=[tenth / 10 for tenth in range(1, 11)],
            registry=self.registry,
        )
        model = Gauge(
            "spam_model_info",
            "The model in use.",
            ("name", "sha256"),
            multiprocess_mode="max",
            registry=self.registry,
        )
        model.labels(card["name"], card["sha256"]).set(1)
        self.requests = cache(requests.labels)
        self.seconds = cache(seconds.labels)

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests(method, path, status).inc()
        self.seconds(path).observe(seconds)

    def scored(self, results: list[tuple[bool, float]]) -> None:
        """Count texts by prediction and propensity."""
        spam = sum([prediction for prediction, _ in results])
        for prediction, texts in ((True, spam), (False, len(results) - spam)):
            if texts:
                self.predictions[prediction].inc(texts)
        for _, propensity in results:
            self.propensity.observe(propensity)

    def exposition(self) -> tuple[bytes, str]:
        """Return the counts and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = self.registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST


def create_app(model: BaseEstimator | None = None, card: dict[str, Any] | None = None) -> Flask:
    """Make the web application.

    Args:
        model: a fitted estimator, as `score.score` takes it; the saved one if None.
        card: its `name`, `sha256`, default `threshold` and `operating_points` (what precision and recall each
            threshold buys); the saved one if None.

    Raises:
        FileNotFoundError, ValueError: the saved model cannot be loaded.
    """
    model = load_model() if model is None else model
    card = load_card() if card is None else card
    # A model that cannot score fails here, and one that can is folded before the workers fork.
    score("", model, card["threshold"])
    metrics = Metrics(card)
    # Batches are scored in turn: side by side they would only take the interpreter from each other, and from
    # single messages.
    turn = threading.Lock()
    app = Flask(__name__)
    specification = (Path(app.static_folder) / "openapi.json").read_text(encoding="utf-8")
    # A form has no limits of its own below that of every body.
    app.config.update(MAX_CONTENT_LENGTH=LARGEST_BODY, MAX_FORM_MEMORY_SIZE=LARGEST_BODY, MAX_FORM_PARTS=None)
    app.json.sort_keys = False

    @app.after_request
    def keep_to_own_scripts(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = "default-src 'self'"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.errorhandler(HTTPException)
    def explain_error(error: HTTPException) -> Response:
        response = error.get_response()
        if error.code >= 400:
            is_body = (
                type(error) is RequestEntityTooLarge
                and error.description == RequestEntityTooLarge.description
            )
            message = f"the body is larger than {LARGEST_BODY} bytes" if is_body else error.description
            response.data = app.json.dumps({"error": message})
            response.content_type = "application/json"
        return response

    def score_fields(fields: dict[str, Any]) -> dict[str, Any]:
        text, threshold = read_text(fields), read_threshold(fields, card["threshold"])
        prediction, propensity = score(text, model, threshold)
        metrics.scored([(prediction, propensity)])
        return {"prediction": prediction, "propensity": propensity, "threshold": threshold}

    @app.post("/score")
    def score_one() -> dict[str, Any]:
        return score_fields(read_fields())

    @app.post("/score/batch")
    def score_many() -> dict[str, Any]:
        fields = read_fields()
        texts, threshold = read_texts(fields), read_threshold(fields, card["threshold"])
        with turn:
            results = score_batch(texts, model, threshold)
            metrics.scored(results)
        return {
            "results": [
                {"prediction": prediction, "propensity": propensity} for prediction, propensity in results
            ],
            "threshold": threshold,
        }

    @app.post("/explain")
    def explain_one() -> dict[str, Any]:
        fields = read_fields()
        text, threshold = read_text(fields), read_threshold(fields, card["threshold"])
        prediction, propensity = score(text, model, threshold)
        return {
            "prediction": prediction,
            "propensity": propensity,
            "threshold": threshold,
            "contributions": explain(text, model),
        }

    @app.get("/")
    def index() -> str:
        return render_template("index.html", card=card)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": card["name"], "sha256": card["sha256"]}

    @app.get("/metrics")
    def expose_metrics() -> Response:
        content, content_type = metrics.exposition()
        return Response(content, content_type=content_type)

    @app.get("/openapi.json")
    def openapi() -> Response:
        return Response(specification, content_type="application/json")

    @app.get("/docs")
    def docs() -> str:
        return render_template("docs.html", specification=json.loads(specification))

    paths = {rule.rule for rule in app.url_map.iter_rules()}
    through_flask = app.wsgi_app

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # Flask's routing and contexts take longer than scoring; a JSON request to /score goes without. Where
        # something is wrong with it, Flask gets it all the same and answers what.
        length = environ.get("CONTENT_LENGTH", "")
        if (
            environ["PATH_INFO"] == "/score"
            and environ["REQUEST_METHOD"] == "POST"
            and environ.get("CONTENT_TYPE") == "application/json"
            and length.isdecimal()
            and int(length) <= LARGEST_BODY
        ):
            body = environ["wsgi.input"].read(int(length))
            try:
                content = json.dumps(score_fields(parse_json(body))).encode()
            except Exception:
                environ["wsgi.input"] = io.BytesIO(body)
            else:
                headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
                start_response("200 OK", headers)
                return [content]
        return through_flask(environ, start_response)

    def count(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        started = perf_counter()

        def start_and_count(status: str, *args: Any) -> Callable[[bytes], Any]:
            # Other paths and methods, which anyone can make up, must not each become a series of their own.
            path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
            metrics.answered(
                method if method in METHODS else "other",
                path if path in paths else "other",
                status[:3],
                perf_counter() - started,
            )
            return start_response(status, *args)

        return answer(environ, start_and_count)

    app.wsgi_app = count
    return app


def read_fields() -> dict[str, Any]:
    """Return the fields of the request's JSON object or form; 400, 413 or 415 where that cannot be."""
    is_form = request.mimetype in FORMS
    if not is_form and not request.is_json:
        abort(415, "send JSON (Content-Type: application/json) or a form")
    body = request.get_data()
    if request.content_length is None and len(body) >= LARGEST_BODY:
        abort(413)  # Werkzeug cuts a chunked body off there without a word
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
        try:
            threshold = float(threshold)
        except ValueError:
            abort(400, "threshold must be a number between 0 and 1")
    try:
        check_threshold(threshold)
    except (TypeError, ValueError) as error:
        abort(400, str(error))
    return float(threshold)


@cache
def load_app() -> Flask:
    """Return this process's application with the saved model."""
    return create_app()


def serve() -> None:
    """Run the production server until SIGTERM or Ctrl-C; requests in flight are answered before it ends."""
    for early in (signal.SIGINT, signal.SIGTERM):  # until the server takes them over
        signal.signal(early, lambda *_: sys.exit())
    host = os.environ.get("HOST") or "127.0.0.1"
    try:
        port, workers = read_environment("PORT", 5000), read_environment("WORKERS", joblib.cpu_count())
        # Each request counts into this folder, and the other folders of a container may be read-only.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=f"spam-metrics-{os.getpid()}-", dir=memory) as counts:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts
            load_app()  # before the workers fork, so that they share its memory
            # The server shares its port with whoever else has it, so nobody else may; and it takes no names.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, port), family=family) as probe:
                address = probe.getsockname()[0]
            shown = f"[{address}]" if family == socket.AF_INET6 else address
            print(f"Serving on http://{shown}:{port} with {workers} workers, Ctrl-C to stop", flush=True)
            Granian(
                "app",
                address=address,
                port=port,
                interface=Interfaces.WSGI,
                workers=workers,
                blocking_threads=THREADS,
                respawn_failed_workers=True,
                # Seconds: the largest legal batch takes one, and some clients never send the rest of theirs.
                workers_kill_timeout=5,
                log_level=LogLevels.error,
            ).serve(target_loader=load_app, wrap_loader=False)
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"Cannot serve on {host}: {error}")


def read_environment(name: str, default: int) -> int:
    """Return a positive whole number from the environment.

    Raises:
        ValueError: it is something else.
    """
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}")
    return int(value)


if __name__ == "__main__":
    serve()
else:
    app = load_app()
