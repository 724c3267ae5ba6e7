"""What stands before each of the operator's routes: a token, limits, a turn, and an answer when the store is away.

A worker of the service scores messages too. So at most two requests to these routes are worked on at a time, one that
reads and one that writes; a few more wait, and all others are refused at once.
"""

import hmac
import time
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, ClassVar, NoReturn

from flask import abort, current_app, request
from flask_smorest import Blueprint
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from marshmallow import RAISE, Schema, ValidationError
from sqlalchemy.exc import DBAPIError
from webargs.flaskparser import FlaskParser
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests

from engine.fields import parse_json, read_body
from engine.work import Queue

RETRY_AFTER = 5  # seconds, when the store is away
# From one address, in each worker: they do not tell each other.
WRONG_TOKENS = parse("10/minute")
READS = parse("300/minute")
ORDERS = parse("60/minute")
FEEDBACK = parse("6000/minute")


class Parser(FlaskParser):
    """Reads the fields of a request as the rest of the service does, and says in one sentence what is wrong."""

    DEFAULT_VALIDATION_STATUS = 400
    DEFAULT_UNKNOWN_BY_LOCATION: ClassVar = {**FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION, "query": RAISE}

    def load_json(self, req: Any, schema: Schema) -> dict[str, Any]:
        """Return the fields of a body; of an empty one none."""
        return parse_json(body) if (body := req.get_data()) else {}

    def handle_error(self, error: ValidationError, *args: Any, **kwargs: Any) -> NoReturn:
        """Answer 400."""
        [problems] = error.messages.values()  # of the only place where fields are
        sentences = [f"{name}: {' '.join(of_field)}" for name, of_field in problems.items()]
        abort(400, " ".join(sentences).removeprefix("_schema: "))


class Routes(Blueprint):
    """Routes for who has the token."""

    ARGUMENTS_PARSER = Parser()

    def __init__(self, name: str, import_name: str, token: str):
        """Make a blueprint without routes.

        Args:
            name, import_name: as Flask's blueprints have them.
            token: that requests must bear.
        """
        super().__init__(name, import_name)
        self.token, self.reads, self.writes = token.encode(), Queue(), Queue()
        self.before_request(self.check)

    @cached_property
    def limiter(self) -> FixedWindowRateLimiter:
        """What counts requests; made in the worker, as its storage has a thread."""
        return FixedWindowRateLimiter(MemoryStorage())

    def add_url_rule(
        self, rule: str, endpoint: str | None = None, view_func: Any = None, *args: Any, **options: Any
    ) -> None:
        """Add a route, whose view is called in its turn."""
        super().add_url_rule(rule, endpoint, self.in_turn(view_func), *args, **options)

    def check(self) -> None:
        """Refuse a request without the token, or one too many; read its body before it waits for its turn."""
        # Then no token is looked at, not even the right one: that is what slows down whoever guesses.
        self.refuse(WRONG_TOKENS, self.limiter.test, "wrong tokens")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self.token):
            self.limiter.hit(WRONG_TOKENS, request.remote_addr)
            bearer = WWWAuthenticate("bearer")
            abort(401, "send the operator's token as Authorization: Bearer ...", www_authenticate=bearer)
        if request.method in ("GET", "HEAD"):
            self.refuse(READS, self.limiter.hit, "requests")
        else:
            self.refuse(FEEDBACK if request.path == "/feedback" else ORDERS, self.limiter.hit, "requests")
        if request.content_length or "HTTP_TRANSFER_ENCODING" in request.environ:
            if not request.is_json:
                abort(415, "send JSON (Content-Type: application/json)")
            read_body()

    def refuse(self, limit: RateLimitItem, allows: Callable[..., bool], what: str) -> None:
        """Answer 429 unless a limit allows another request."""
        if not allows(limit, request.remote_addr):
            wait = max(1, round(self.limiter.get_window_stats(limit, request.remote_addr).reset_time - time.time()))
            raise TooManyRequests(f"too many {what} from your address: try again in {wait} seconds", retry_after=wait)

    def in_turn(self, view: Callable[..., Any]) -> Callable[..., Any]:
        """Return a view that waits for its turn, and answers 503 where the store does not answer."""

        @wraps(view)
        def answer(*args: Any, **kwargs: Any) -> Any:
            queue = self.reads if request.method in ("GET", "HEAD") else self.writes
            try:
                return queue.run(lambda: view(*args, **kwargs))
            except DBAPIError as error:
                current_app.logger.warning("The store does not answer: %s", reason(error))
                message = "the store does not answer; messages are scored all the same: try again later"
                raise ServiceUnavailable(message, retry_after=RETRY_AFTER) from None

        return answer


def reason(error: DBAPIError) -> str:
    """Return the first line of what a database says is wrong."""
    return str(error.orig).strip().partition("\n")[0]
