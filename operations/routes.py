"""The operator's routes: orders for jobs, what users say, and what the page shows."""

from typing import Any

import sqlalchemy as sa
from flask import Response, abort, url_for
from sklearn.base import BaseEstimator

from engine.fields import refuse_long
from engine.linear import LinearModel
from operations import jobs, recent, schemas
from operations.access import Routes
from operations.gauges import exposition
from operations.spool import clean
from operations.store import SECOND, WORKERS, add_label, find_message, models, now, reader

NUMBER = f"<int(max={schemas.LARGEST_ID}):"  # of a job or a model
ON_ITS_WAY = 600 * SECOND  # for which a message may be unknown to the store that was scored


def make_routes(
    engine: sa.Engine, model: BaseEstimator | LinearModel, card: dict[str, Any], keeps_texts: bool, token: str
) -> Routes:
    """Return the operator's routes.

    Args:
        engine: of the store.
        model, card: what is served.
        keeps_texts: whether the texts are kept that come with feedback.
        token: that requests must bear.
    """
    routes = Routes("operations", __name__, token)
    location = {"Location": {"description": "of the job", "schema": {"type": "string"}}}
    accepted = routes.response(202, schemas.Job, description="The job that will do it", headers=location)

    def order(kind: str, arguments: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
        number = jobs.enqueue(engine, kind, arguments)
        return jobs.find_job(engine, number), {"Location": url_for("operations.show_job", job=number)}

    def refuse_unknown_model(number: int) -> None:
        with reader(engine).connect() as connection:
            if not connection.scalar(sa.select(sa.exists().where(models.c.id == number))):
                abort(404, f"there is no model {number}")

    def find_job(number: int) -> dict[str, Any]:
        return jobs.find_job(engine, number) or abort(404, f"there is no job {number}")

    @routes.post("/prepare")
    @accepted
    def prepare():
        """Prepare the data anew"""
        return order("prepare")

    @routes.post("/train")
    @accepted
    def train():
        """Train a candidate, on what came back too"""
        return order("train")

    @routes.post("/evaluate")
    @routes.arguments(schemas.Period, required=False)
    @accepted
    def evaluate(period):
        """Evaluate what the filter did to users in a period"""
        return order("evaluate", period)

    @routes.post("/monitor")
    @routes.arguments(schemas.Period, required=False)
    @accepted
    def monitor(period):
        """Look for drift, errors and unequal service in a period"""
        return order("monitor", period)

    @routes.post("/score/stored")
    @routes.arguments(schemas.Rescoring, required=False)
    @accepted
    def rescore(fields):
        """Score stored messages again"""
        if "model" in fields:
            refuse_unknown_model(fields["model"])
        return order("rescore", fields)

    @routes.post(f"/models/{NUMBER}number>/promote")
    @routes.alt_response(404, schema=schemas.Problem, description="There is no such model")
    @accepted
    def promote(number):
        """Serve a candidate, if it meets the conditions"""
        refuse_unknown_model(number)
        return order("promote", {"model": number})

    @routes.post("/models/roll-back")
    @accepted
    def roll_back():
        """Serve the model again that was served before"""
        return order("roll_back")

    @routes.get("/jobs")
    @routes.arguments(schemas.Page, location="query")
    @routes.response(200, schemas.Job(many=True))
    def list_jobs(page):
        """List the latest jobs"""
        return jobs.list_jobs(engine, page["limit"])

    @routes.get(f"/jobs/{NUMBER}job>")
    @routes.response(200, schemas.JobWithLog)
    @routes.alt_response(404, schema=schemas.Problem, description="There is no such job")
    def show_job(job):
        """Tell where a job stands"""
        return {**find_job(job), "log": jobs.read_log(job)}

    @routes.delete(f"/jobs/{NUMBER}job>")
    @routes.response(200, schemas.Job)
    @routes.alt_response(404, schema=schemas.Problem, description="There is no such job")
    @routes.alt_response(409, schema=schemas.Problem, description="It is over")
    def cancel_job(job):
        """Cancel a job"""
        find_job(job)
        if not jobs.cancel(engine, job):
            abort(409, f"job {job} is over, so it cannot be cancelled: it is {find_job(job)['state']}")
        return find_job(job)

    @routes.post("/feedback")
    @routes.arguments(schemas.Word)
    @routes.response(201, schemas.Stored, description="It is stored")
    @routes.alt_response(200, schema=schemas.Stored, description="It replaces what this source had said", success=True)
    @routes.alt_response(404, schema=schemas.Problem, description="There is no such message")
    @routes.alt_response(413, schema=schemas.Problem, description="The text is too long")
    def take_feedback(word):
        """Take a complaint, a report of spam or a review"""
        number, text = int(word["message"]), word.get("text")
        found = find_message(engine, number)
        if not (found or -SECOND < now() - number // WORKERS < ON_ITS_WAY):
            abort(404, f"there is no message {number}")
        refuse_long(text or "")
        label = word.get("label") or {"complaint": "ham", "spam report": "spam"}[word["source"]]
        kept = clean(text) if keeps_texts else None
        is_new = add_label(engine, number, word["source"], int(label == "spam"), kept, found and found["sender"])
        return {"message": number, "source": word["source"], "label": label}, 201 if is_new else 200

    @routes.get("/feedback")
    @routes.arguments(schemas.Page, location="query")
    @routes.response(200, schemas.Label(many=True))
    def list_feedback(page):
        """List what users said last, and what the filter had said"""
        return recent.list_feedback(engine, page["limit"])

    @routes.get("/models")
    @routes.response(200, schemas.Model(many=True))
    def list_models():
        """List the models"""
        return recent.list_models(engine)

    @routes.get("/takedowns")
    @routes.arguments(schemas.Page, location="query")
    @routes.response(200, schemas.Takedown(many=True))
    def list_takedowns(page):
        """List what was taken down last, and why"""
        return recent.list_takedowns(engine, page["limit"], model, card["sha256"])

    @routes.get("/evaluations")
    @routes.arguments(schemas.Page, location="query")
    @routes.response(200, schemas.Evaluation(many=True))
    def list_evaluations(page):
        """List the latest evaluations"""
        return recent.list_evaluations(engine, page["limit"])

    @routes.get("/monitoring")
    @routes.arguments(schemas.Page, location="query")
    @routes.response(200, schemas.Monitored(many=True))
    def list_monitored(page):
        """List what was found when the latest periods were looked at"""
        return recent.list_monitored(engine, page["limit"])

    @routes.get("/operations/metrics")
    @routes.response(200, {"type": "string"}, content_type="text/plain")
    def expose_gauges():
        """Tell Prometheus of the last night and of the jobs"""
        content, content_type = exposition(engine)
        return Response(content, content_type=content_type)

    return routes
