"""What can be read of the service: its page, its metrics, its health, and the description of its interface."""

import json
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, abort, render_template

from engine.metrics import Metrics
from engine.supervisor import draining

SPECIFICATION = Path(__file__).resolve().parents[1] / "static" / "openapi.json"


def make_pages(card: dict[str, Any], metrics: Metrics, explains: bool) -> Blueprint:
    """Return the pages of an application.

    Args:
        card: of its model.
        metrics: what it counts.
        explains: whether it explains its scores.
    """
    pages = Blueprint("pages", __name__)
    specification = SPECIFICATION.read_text(encoding="utf-8")

    @pages.get("/")
    def index() -> str:
        return render_template("index.html", card=card, explains=explains)

    @pages.get("/health/live")
    def live() -> dict[str, Any]:
        return {"status": "ok"}

    @pages.get("/health/ready")
    def ready() -> dict[str, Any]:
        if draining():
            abort(503, "the service is about to end: send requests to another")
        return {"status": "ok"}

    @pages.get("/metrics")
    def expose_metrics() -> Response:
        content, content_type = metrics.exposition()
        return Response(content, content_type=content_type)

    @pages.get("/openapi.json")
    def openapi() -> Response:
        return Response(specification, content_type="application/json")

    @pages.get("/docs")
    def docs() -> str:
        return render_template("docs.html", specification=json.loads(specification))

    return pages
