"""Serve the trained model over HTTP: JSON for programs, metrics for operators, a page for people.

`python app.py` runs a production server; HOST, PORT and WORKERS in the environment set its address (0.0.0.0
for all interfaces), its port and its number of processes, and EXPLAIN=off turns /explain off. SIGHUP has it load
the model that lies in models/ by then. `flask --app app run` runs Flask's own server.

The production server waits for the body of a request as long as its client likes. On an open network it belongs
behind a proxy that limits that time, as docs/nginx.conf does.
"""

from collections.abc import Callable
from json import JSONEncoder
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, abort

from engine.answers import HEADERS, prepare_answers, respond
from engine.fields import LARGEST_BATCH_BODY, SMALL_BODY, parse_fields, parse_json, read_batch, read_body, read_message
from engine.linear import LinearModel
from engine.metrics import CountRequests, Metrics
from engine.pages import make_pages
from engine.server import read_switch, serve
from engine.shortcut import Shortcut
from engine.work import Queue
from score import explain, load_card, load_scorer, score, score_batch

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

PART = 10  # texts of a batch, after which it is seen whether their answer is still in time


def create_app(
    model: "BaseEstimator | LinearModel | None" = None,
    card: dict[str, Any] | None = None,
    explains: bool | None = None,
    record: Callable[[dict, list[str], list[tuple[bool, float]], float], list[str]] | None = None,
) -> Flask:
    """Make the web application.

    Args:
        model: as `score.score` takes it; the saved one if None.
        card: its `name`, `sha256`, default `threshold` and `operating_points` (what share of spam each threshold
            catches and of ham it takes down, by source); the saved one if None.
        explains: whether /explain answers; if None, unless EXPLAIN in the environment is off.
        record: is told the fields of each request to score, its texts, their predictions and propensities, and the
            threshold; returns a name for each text, which its answer then holds as `id`.

    Raises:
        FileNotFoundError, ValueError: the saved model cannot be loaded, or EXPLAIN is neither on nor off.
    """
    model = load_scorer() if model is None else model
    card = load_card() if card is None else card
    explains = read_switch("EXPLAIN") if explains is None else explains
    # A model that cannot score fails here, and one that can is folded before the workers fork.
    score("", model, card["threshold"])
    metrics, heavy = Metrics(card), Queue()  # batches, explanations and long bodies wait for their turn
    app = Flask(__name__)
    app.json.sort_keys = False
    app.register_blueprint(make_pages(card, metrics, explains))
    prepare_answers(app)

    def score_text(fields: dict[str, Any]) -> dict[str, Any]:
        text, threshold = read_message(fields, card["threshold"])
        prediction, propensity = score(text, model, threshold)
        metrics.scored([(prediction, propensity)])
        answer = {"prediction": prediction, "propensity": propensity, "threshold": threshold}
        if record:
            [answer["id"]] = record(fields, [text], [(prediction, propensity)], threshold)
        return answer

    def score_texts(body: bytes) -> dict[str, Any]:
        fields, results = parse_fields(body), []
        texts, threshold = read_batch(fields, card["threshold"])
        for i in range(0, len(texts), PART):
            heavy.check_deadline()
            results += score_batch(texts[i : i + PART], model, threshold)
        metrics.scored(results)
        answers = [{"prediction": prediction, "propensity": propensity} for prediction, propensity in results]
        if record:
            for answer, name in zip(answers, record(fields, texts, results, threshold), strict=True):
                answer["id"] = name
        return {"results": answers, "threshold": threshold}

    def explain_text(body: bytes) -> Response:
        fields = parse_fields(body)
        text, threshold = read_message(fields, card["threshold"])
        prediction, propensity = score(text, model, threshold)
        answer = {"prediction": prediction, "propensity": propensity, "threshold": threshold}
        answer["contributions"] = explain(text, model)
        # Value by value, as json.dumps would keep the interpreter for milliseconds.
        return Response("".join(JSONEncoder().iterencode(answer)), mimetype="application/json")

    @app.post("/score")
    def score_one() -> Response:
        body = read_body()
        if len(body) <= SMALL_BODY:
            return respond(score_text(parse_fields(body)))
        return respond(heavy.run(lambda: score_text(parse_fields(body))))

    @app.post("/score/batch")
    def score_many() -> Response:
        return respond(heavy.run(score_texts, read_body(LARGEST_BATCH_BODY)))

    @app.post("/explain")
    def explain_one() -> Response:
        if not explains:
            abort(403, "this server does not explain its scores")
        return heavy.run(explain_text, read_body())

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": card["name"], "sha256": card["sha256"]}

    paths = {rule.rule for rule in app.url_map.iter_rules()}
    through_flask = app.wsgi_app
    shortcut = Shortcut(through_flask, "/score", lambda body: score_text(parse_json(body)), HEADERS, SMALL_BODY)
    app.wsgi_app = CountRequests(shortcut, metrics, paths)
    return app


if __name__ == "__main__":
    serve(create_app)
else:
    app = create_app()
