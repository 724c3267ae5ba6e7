"""The proxy of docs/nginx.conf before the service: who gets through it, and what it keeps away."""

import re
import shutil
import time

import pytest
from helpers import ROOT, launched, missing, poll

from benchmarks.floods import FLOODS, MESSAGE, STRANGER, Target, Watch, ask, flooded, request
from benchmarks.proxy import find_nginx, proxied
from engine.fields import LARGEST_BODY

pytestmark = pytest.mark.proxy
BYSTANDER = "127.0.0.3"  # no gateway either
SCORE = FLOODS["idle"]


def require_tools():
    """Skip the tests where nginx or openssl is missing."""
    if not (find_nginx() and shutil.which("openssl")):
        missing("apt-get install nginx openssl")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The service with two workers, and the proxy before it."""
    require_tools()
    with launched(WORKERS="2") as (process, url):
        service = Target.of(url, process.pid)
        with proxied(service, tmp_path_factory.mktemp("proxy")) as proxy:
            yield service, proxy


@pytest.fixture(scope="module")
def proxy(servers):
    """The proxy."""
    return servers[1]


def get(path, *headers):
    """Return a request for a path."""
    return request(path, b"", *headers, method="GET", type="")


@pytest.mark.parametrize(("flood", "count"), [("idle", 1100), ("stalled", 512), ("never reading", 1100)])
def test_a_flood_keeps_nobody_out(proxy, flood, count):
    with flooded(proxy, FLOODS[flood], count) as connected:
        assert connected > count / 2
        with Watch(proxy) as watch:
            poll(lambda: len(watch.good) >= 100 or watch.lost, "100 answers")
            assert ask(proxy, SCORE, source=BYSTANDER).status == 200
    assert watch.seen.refused == 0
    assert watch.seen.lost == []


def test_a_stranger_sends_only_so_much(proxy):
    begun = time.monotonic()
    statuses = [ask(proxy, SCORE, source=STRANGER).status for _ in range(100)]
    # 40 at once and 20 a second.
    assert statuses.count(200) <= 42 + 20 * (time.monotonic() - begun)
    refusal = poll(lambda: (answer := ask(proxy, SCORE, source=STRANGER)).status == 429 and answer, "a refusal")
    assert refusal.getheader("Retry-After") == "1"
    assert b'{"error": "too many requests' in refusal.content
    assert ask(proxy, SCORE, source=BYSTANDER).status == 200


def test_a_gateway_sends_what_the_operator_needs(proxy):
    with proxy.connect() as connection:
        connection.sendall(SCORE * 1700)
        received = b""
        while received.count(b"HTTP/1.1 ") < 1700 and (more := connection.recv(2**20)):
            received += more
    assert received.count(b"HTTP/1.1 200 ") == 1700


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/static/style.css"])
def test_pages_pass(proxy, path):
    answer = ask(proxy, get(path))
    assert answer.status == 200
    assert answer.getheader("Server") == "nginx"
    assert answer.getheader("Strict-Transport-Security")


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/health",
        "/health/live",
        "/health/ready",
        "/%6detrics",
        "//metrics",
        "/./metrics",
        "/docs/../metrics",
        "/metrics/",
        "/metrics?x",
        "http://spam/metrics",
        "/health%2flive",
    ],
)
def test_what_is_for_the_operator_does_not_pass(proxy, path):
    answer = ask(proxy, get(path))
    assert answer.status == 404
    assert answer.content == b'{"error": "there is nothing at this address"}\n'


def test_the_largest_body(proxy):
    body = MESSAGE + b" " * (LARGEST_BODY - len(MESSAGE))
    assert ask(proxy, request("/score", body)).status == 200
    answer = ask(proxy, request("/score", body + b" "))
    assert answer.status == 413
    assert f"larger than {LARGEST_BODY} bytes" in answer.content.decode()


def test_a_body_that_no_endpoint_takes(proxy):
    answer = ask(proxy, request("/score/batch", b" " * (2**20 + 1)))
    assert answer.status == 413
    assert answer.content == b'{"error": "the body is larger than 1048576 bytes"}\n'


def test_what_the_service_refuses_comes_through(servers):
    service, proxy = servers
    assert ask(proxy, request("/score", b"{")).content == ask(service, request("/score", b"{")).content


def test_a_service_that_is_away_is_said_so(tmp_path):
    require_tools()
    with launched(WORKERS="1") as (process, url):
        service = Target.of(url, process.pid)
        with proxied(service, tmp_path) as proxy:
            process.terminate()
            process.wait(10)
            answer = ask(proxy, SCORE)
    assert answer.status == 503
    assert answer.getheader("Retry-After") == "1"
    assert answer.content == b'{"error": "the service cannot be reached: try again"}\n'


def test_it_covers_the_time_the_service_takes():
    configuration = (ROOT / "docs" / "nginx.conf").read_text(encoding="utf-8")
    assert int(re.search(r"proxy_read_timeout (\d+)s;", configuration)[1]) > 5
