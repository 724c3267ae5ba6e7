"""The operator's service: the filter over HTTP as app.py serves it, with a store, jobs and feedback behind it.

`python -m operations.web` serves the model that was promoted last. Besides what app.py reads from the environment,
OPERATIONS_KEY is the key of the hashes of senders, and OPERATIONS_TOKEN what the operator's routes ask for; without it
there are none. SIGHUP has it load the model and the candidate that are there by then.
"""

import os
import signal
import sys
from typing import Any

import sqlalchemy as sa
import yaml
from flask import Blueprint, Flask, render_template
from flask_smorest import Api
from sklearn.base import BaseEstimator
from sqlalchemy.exc import DBAPIError

from app import create_app
from engine.files import write
from engine.linear import LinearModel
from engine.server import read_environment, serve
from operations.access import reason
from operations.promotion import find_candidate, first_model, model_path
from operations.routes import make_routes
from operations.schemas import Problem
from operations.spool import Recorder
from operations.store import ROOT, STATE, check_version, lock, open_store
from score import load_card, load_scorer

PATIENCE = 3  # seconds that a request waits for the store, less than for its turn
PID = STATE / "server.pid"
SHORTEST_SECRET = 16  # characters


class OperationsApi(Api):
    """The description of the routes; their errors are those of the whole service."""

    ERROR_SCHEMA = Problem

    def _register_error_handlers(self) -> None:
        """Leave the application's own as they are."""


def create_operations_app(
    engine: sa.Engine,
    model: BaseEstimator | LinearModel,
    card: dict[str, Any],
    recorder: Recorder,
    token: str | None = None,
) -> Flask:
    """Make the operator's application.

    Args:
        engine: of the store.
        model, card: what is served, as `app.create_app` takes them.
        recorder: of what is scored.
        token: what the operator's routes ask for; without one there are none.
    """
    app = create_app(model, card, record=recorder)
    if not token:
        return app
    app.config.update(
        API_TITLE="SMS spam filter: operations",
        API_VERSION="1.0.0",
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/operations",
    )
    api = OperationsApi(app)
    api.spec.components.security_scheme("token", {"type": "http", "scheme": "bearer"})
    api.spec.options["security"] = [{"token": []}]
    keeps_texts = recorder.params["feedback_days"] > 0
    api.register_blueprint(make_routes(engine, model, card, keeps_texts, token))

    page = Blueprint("page", __name__, template_folder="templates", static_folder="static")

    @page.get("")
    def show() -> str:
        return render_template("operations.html")

    app.register_blueprint(page, url_prefix="/operations")
    return app


def load() -> Flask:
    """Return the application with the model that is served by now, and the newest candidate.

    Raises:
        ValueError: the environment, the store or the model is not right.
        FileNotFoundError: there is no model.
    """
    key, token = read_secret("OPERATIONS_KEY"), read_secret("OPERATIONS_TOKEN")
    if not key:
        raise ValueError("OPERATIONS_KEY is missing: the hashes of senders need a key, which must stay the same")
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]
    engine, shadow, problem = open_store(patience=PATIENCE), None, None
    try:
        check_version(engine)
        shadow = load_candidate(engine)
    except DBAPIError as error:
        problem = reason(error)
    try:
        path = first_model(engine)
    except DBAPIError as error:
        raise ValueError(f"the store does not answer, and no model has served yet: {reason(error)}") from None
    engine.dispose()  # a worker must not share a connection with others
    if problem:
        print(f"The store does not answer, but messages are scored: {problem}", file=sys.stderr, flush=True)
    model, card = load_scorer(path), load_card(path)
    recorder = Recorder(card, params, STATE / "spool", key.encode(), shadow)
    return create_operations_app(engine, model, card, recorder, token)


def load_candidate(engine: sa.Engine) -> tuple[BaseEstimator | LinearModel, dict[str, Any]] | None:
    """Return the newest candidate with its card; None where there is none, or none that can be loaded."""
    candidate = find_candidate(engine)
    if not candidate:
        return None
    path = model_path(candidate.sha256)
    try:
        return load_scorer(path), load_card(path)
    except (OSError, ValueError) as error:
        print(f"The candidate does not score on the side: {error}", file=sys.stderr, flush=True)
        return None


def read_secret(name: str) -> str | None:
    """Return a secret from the environment, or None where there is none.

    Raises:
        ValueError: it is too short, or cannot be sent in a header.
    """
    value = os.environ.get(name)
    if value and (len(value) < SHORTEST_SECRET or not (value.isascii() and value.isprintable()) or " " in value):
        raise ValueError(f"{name} must have at least {SHORTEST_SECRET} letters, digits or signs of ASCII, and no space")
    return value or None


def main() -> None:
    """Serve, and say in the state's folder which process does."""
    STATE.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server takes it over
    with open(STATE / "server.lock", "wb") as alone:
        if not lock(alone):
            sys.exit(f"Cannot serve: another process serves from {STATE}")
        try:
            serve(load_and_tell)
        finally:
            PID.unlink(missing_ok=True)


def load_and_tell() -> Flask:
    """Return what `load` does, and write the number and the port of this process to a file."""
    app = load()
    write(PID, f"{os.getpid()} {read_environment('PORT', 5000)}\n".encode())
    return app


if __name__ == "__main__":
    main()
