"""The fast way to one endpoint, past Flask's routing and contexts, which take longer than scoring does."""

from collections.abc import Callable, Iterable, Mapping
from threading import Lock
from typing import Any

import orjson

FAILURE = "shortcut.failure"


def dump(answer: Any) -> bytes:
    """Return an answer as JSON."""
    return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)


class Shortcut:
    """WSGI middleware that answers the JSON requests to one path itself.

    What it answers is what comes the long way, byte for byte and header for header. Where something is wrong with a
    request, it leaves the exception in the environment under FAILURE and hands over to Flask, which raises it
    and answers what its own error handlers say; the work is not done again.

    One request is answered at a time. The interpreter does no more anyway, and of many threads that wait for it each
    wakes up after every slice to ask for it, which after a stall costs more than the answers do.
    """

    def __init__(
        self,
        wsgi_app: Callable[..., Iterable[bytes]],
        path: str,
        answer: Callable[[bytes], Any],
        headers: Mapping[str, str],
        largest_body: int,
    ):
        """Put the shortcut before an application.

        Args:
            wsgi_app: what answers every other request.
            path: of the endpoint, for POST.
            answer: from the body of a request to what its JSON answer holds.
            headers: of every answer of the application.
            largest_body: in bytes; a larger one, or one of unstated length, takes the long way.
        """
        self.wsgi_app, self.path, self.answer, self.largest_body = wsgi_app, path, answer, largest_body
        self.headers, self.turn = list(headers.items()), Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request."""
        if not self.is_for(environ):
            return self.wsgi_app(environ, start_response)
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        try:
            with self.turn:
                content = dump(self.answer(body))
        except Exception as error:  # raised again within Flask, which logs what nobody expected
            environ[FAILURE] = error
            return self.wsgi_app(environ, start_response)
        described = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        start_response("200 OK", described + self.headers)
        return [content]

    def is_for(self, environ: dict[str, Any]) -> bool:
        """Tell whether a request is a JSON one to the path, of a stated length within the limit."""
        length = environ.get("CONTENT_LENGTH", "")
        return (
            environ["PATH_INFO"] == self.path
            and environ["REQUEST_METHOD"] == "POST"
            and environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() == "application/json"
            and length.isascii()
            and length.isdecimal()
            and len(length) < 20
            and int(length) <= self.largest_body
        )
