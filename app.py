"""Serve the trained model over HTTP: JSON for programs, metrics for operators, a page for people.

`python app.py` runs a production server; HOST, PORT and WORKERS in the environment set its address (0.0.0.0
for all interfaces), its port and its number of processes, and SIGHUP has it load the model that lies in models/ by
then. `flask --app app run` runs Flask's own server.

The production server waits for the body of a request as long as its client likes. On the open internet it
belongs behind a proxy that limits that time, or stalled clients, 256 for each worker, keep everyone else out.
"""

import json
import threading
from pathlib import Path
from typing import Any

from flask import Flask, Response, render_template, request
from sklearn.base import BaseEstimator
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, ServiceUnavailable

from engine.fields import LARGEST_BODY, parse_json, read_fields, read_text, read_texts, read_threshold
from engine.metrics import CountRequests, Metrics
from engine.server import serve
from engine.shortcut import FAILURE, Shortcut
from engine.supervisor import draining
from score import explain, load_card, load_model, score, score_batch

HEADERS = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff"}


def create_app(model: BaseEstimator | None = None, card: dict[str, Any] | None = None) -> Flask:
    """Make the web application.

    Args:
        model: a fitted estimator, as `score.score` takes it; the saved one if None.
        card: its `name`, `sha256`, default `threshold` and `operating_points` (what share of spam each threshold
            catches and of ham it takes down, by source); the saved one if None.

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
    # One byte more than is allowed: Werkzeug cuts a body of unstated length off there without a word.
    app.config.update(MAX_CONTENT_LENGTH=LARGEST_BODY + 1, MAX_FORM_MEMORY_SIZE=LARGEST_BODY)
    app.json.sort_keys = False
    specification = (Path(app.static_folder) / "openapi.json").read_text(encoding="utf-8")

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
        answers = [{"prediction": prediction, "propensity": propensity} for prediction, propensity in results]
        return {"results": answers, "threshold": threshold}

    @app.post("/explain")
    def explain_one() -> dict[str, Any]:
        fields = read_fields()
        text, threshold = read_text(fields), read_threshold(fields, card["threshold"])
        prediction, propensity = score(text, model, threshold)
        answer = {"prediction": prediction, "propensity": propensity, "threshold": threshold}
        return {**answer, "contributions": explain(text, model)}

    @app.get("/")
    def index() -> str:
        return render_template("index.html", card=card)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": card["name"], "sha256": card["sha256"]}

    @app.get("/health/live")
    def live() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/health/ready")
    def ready() -> dict[str, Any]:
        if draining():
            raise ServiceUnavailable("the service is about to end: send requests to another")
        return {"status": "ok"}

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

    @app.before_request
    def raise_failure_of_the_shortcut() -> None:
        if FAILURE in request.environ:
            raise request.environ[FAILURE]

    @app.after_request
    def keep_to_own_scripts(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def explain_error(error: HTTPException) -> Response:
        response = error.get_response()
        if error.code >= 400:
            message = error.description
            if type(error) is RequestEntityTooLarge and message == RequestEntityTooLarge.description:
                message = f"the body is larger than {LARGEST_BODY} bytes"
            response.data = app.json.dumps({"error": message})
            response.content_type = "application/json"
        return response

    paths = {rule.rule for rule in app.url_map.iter_rules()}
    through_flask = app.wsgi_app
    shortcut = Shortcut(through_flask, "/score", lambda body: score_fields(parse_json(body)), HEADERS, LARGEST_BODY)
    app.wsgi_app = CountRequests(shortcut, metrics, paths)
    return app


if __name__ == "__main__":
    serve(create_app)
else:
    app = create_app()
