"""What the operator's routes take and answer, from which their description in OpenAPI is made."""

from datetime import UTC, datetime, timedelta
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from engine.fields import LONGEST_TEXT
from operations.store import SOURCES

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LARGEST_ID = 2**63 - 1


class Time(fields.AwareDateTime):
    """A time, in ISO 8601 and UTC outside and in microseconds since 1970 inside."""

    def __init__(self, **options: Any):
        super().__init__(format="iso", default_timezone=UTC, **options)

    def _serialize(self, value: int | None, *args: Any, **kwargs: Any) -> str | None:
        return None if value is None else (EPOCH + timedelta(microseconds=value)).isoformat()

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> int:
        return (super()._deserialize(value, *args, **kwargs) - EPOCH) // timedelta(microseconds=1)


class Number(fields.Integer):
    """The number of a model: a whole one, which comes as a float, like all numbers of a body."""

    def __init__(self, **options: Any):
        super().__init__(strict=True, validate=validate.Range(1, LARGEST_ID), **options)

    def _validated(self, value: Any) -> int:
        return super()._validated(int(value) if isinstance(value, float) and value.is_integer() else value)


def _message() -> fields.String:
    """Return the field of a message's number: a string, as JavaScript rounds numbers of this size."""
    return fields.String(required=True, validate=validate.Regexp(r"[0-9]{1,19}\Z", error="Not the id of a message."))


class Problem(Schema):
    """Why a request was refused."""

    error = fields.String(required=True)


# Taken


class Page(Schema):
    """How much of a list is asked for."""

    limit = fields.Integer(load_default=50, validate=validate.Range(1, 200))


class Period(Schema):
    """A period; by default the day before now."""

    start = Time()
    end = Time()

    @validates_schema
    def check(self, data: dict[str, int], **_: Any) -> None:
        """Refuse a period that ends before it begins."""
        if data.get("start", 0) >= data.get("end", LARGEST_ID):
            raise ValidationError("start must be before end")


class Rescoring(Schema):
    """By which model stored messages are scored; by default the one that is served."""

    model = Number()


class Word(Schema):
    """What somebody says of a message: a complaint that it is missing, a report that it is spam, or a review."""

    message = _message()
    source = fields.String(required=True, validate=validate.OneOf(SOURCES))
    label = fields.String(validate=validate.OneOf(["ham", "spam"]), metadata={"description": "of a reviewer"})
    text = fields.String(metadata={"maxLength": LONGEST_TEXT, "description": "is kept to learn from"})

    @validates_schema
    def check(self, data: dict[str, str], **_: Any) -> None:
        """Refuse a reviewer without a label, and others with one."""
        if (data["source"] == "reviewer") != ("label" in data):
            raise ValidationError("label must be there for a reviewer, and for nobody else")


# Answered


class Job(Schema):
    """A job."""

    id = fields.Integer(required=True)
    kind = fields.String(required=True)
    state = fields.String(required=True)
    arguments = fields.Dict(required=True)
    attempt = fields.Integer(required=True)
    progress = fields.Float(required=True, metadata={"description": "from 0 to 1"})
    message = fields.String(required=True)
    result = fields.Dict(required=True, allow_none=True)
    created = Time(required=True)
    started = Time(required=True, allow_none=True)
    finished = Time(required=True, allow_none=True)


class JobWithLog(Job):
    """A job, and the last lines that it printed."""

    log = fields.String(required=True)


class Label(Schema):
    """What was said of a message, and what the filter had said: nothing is known of one that is not stored yet."""

    message = _message()
    source = fields.String(required=True)
    label = fields.String(required=True)
    received = Time(required=True)
    text = fields.String(required=True, allow_none=True)
    scored = fields.Nested(
        Schema.from_dict(
            {
                "propensity": fields.Float(required=True),
                "threshold": fields.Float(required=True),
                "prediction": fields.Boolean(required=True),
                "action": fields.String(required=True, allow_none=True),
                "region": fields.String(required=True, allow_none=True),
                "model": fields.Integer(required=True),
            },
            name="Decision",
        ),
        required=True,
        allow_none=True,
    )


class Stored(Schema):
    """What became of feedback."""

    message = _message()
    source = fields.String(required=True)
    label = fields.String(required=True)


class Model(Schema):
    """A model; of a candidate also what it would have decided otherwise, among the latest messages."""

    id = fields.Integer(required=True)
    name = fields.String(required=True)
    sha256 = fields.String(required=True)
    state = fields.String(required=True)
    created = Time(required=True)
    promoted = Time(required=True, allow_none=True)
    mlflow_version = fields.Integer(required=True, allow_none=True)
    threshold = fields.Float(required=True)
    metrics = fields.Dict(required=True, metadata={"description": "of the test data, by source"})
    shadow = fields.Nested(
        Schema.from_dict(
            {"messages": fields.Integer(required=True), "changed": fields.Integer(required=True)}, name="Shadow"
        ),
        required=True,
        allow_none=True,
    )


class Takedown(Schema):
    """A message that was taken down, and the words that did it where its text is kept."""

    message = _message()
    time = Time(required=True)
    region = fields.String(required=True, allow_none=True)
    propensity = fields.Float(required=True)
    threshold = fields.Float(required=True)
    model = fields.Integer(required=True)
    text = fields.String(required=True, allow_none=True)
    why = fields.List(
        fields.Nested(
            Schema.from_dict(
                {"word": fields.String(required=True), "log_odds": fields.Float(required=True)}, name="Reason"
            )
        ),
        required=True,
        allow_none=True,
    )


class Evaluation(Schema):
    """What the filter did to users in a period."""

    id = fields.Integer(required=True)
    created = Time(required=True)
    start = Time(required=True)
    end = Time(required=True)
    result = fields.Dict(required=True)


class Monitored(Schema):
    """What was found when a period was looked at."""

    id = fields.Integer(required=True)
    created = Time(required=True)
    start = Time(required=True)
    end = Time(required=True)
    model = fields.Integer(required=True)
    result = fields.Dict(required=True)
