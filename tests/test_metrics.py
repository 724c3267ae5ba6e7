"""engine/metrics.py: what is counted, and that workers count together."""

import subprocess
import sys

import pytest
import requests
from helpers import HAM, ROOT, LengthModel, counted, launched, stub_card

from app import create_app


@pytest.fixture
def stub_client():
    """A client of the application with the stub."""
    return create_app(LengthModel(), stub_card(threshold=0.2)).test_client()


def test_metrics(stub_client):
    before = stub_client.get("/metrics").text
    stub_client.post("/score", json={"text": "x" * 35})
    stub_client.post("/score", data={"text": "x" * 85})
    stub_client.post("/score/batch", json={"texts": ["x"] * 5})
    stub_client.post("/score", json={})
    stub_client.open("/score", method="MADEUP")
    stub_client.get("/made/up")
    after = stub_client.get("/metrics").text
    growth = {
        'http_requests_total{method="POST",path="/score",status="200"}': 2,
        'http_requests_total{method="POST",path="/score/batch",status="200"}': 1,
        'http_requests_total{method="POST",path="/score",status="400"}': 1,
        'http_requests_total{method="other",path="/score",status="405"}': 1,
        'http_requests_total{method="GET",path="other",status="404"}': 1,
        'http_request_duration_seconds_count{path="/score"}': 4,
        'spam_predictions_total{prediction="spam"}': 2,
        'spam_predictions_total{prediction="ham"}': 5,
        'spam_propensity_bucket{le="0.4"}': 6,
        "spam_propensity_count": 7,
    }
    assert {sample: counted(after, sample) - counted(before, sample) for sample in growth} == growth
    assert counted(after, 'spam_model_info{name="stub",sha256="0"}') == 1
    assert "made" not in after.lower()


def test_workers_count_together():
    sample = 'http_requests_total{method="POST",path="/score",status="200"}'
    with launched(WORKERS="2") as (_, url):
        for _ in range(40):  # each on a connection of its own, so that both workers get some
            assert requests.post(f"{url}/score", json={"text": HAM[0]}, timeout=5).ok
        for _ in range(6):
            assert counted(requests.get(f"{url}/metrics", timeout=5).text, sample) == 40


def test_what_a_process_has_counted_stays_when_another_takes_its_place():
    program = """
import os, app
from engine import metrics
metrics.count_together(2)
client = app.create_app().test_client()
for place in (0, 1, 0):
    if not os.fork():
        metrics.count_as(place)
        client.post("/score", json={"text": ""})
        os._exit(0)
    os.wait()
app.create_app()  # as at SIGHUP: it goes on with the counts
print(client.get("/metrics").text)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert counted(done.stdout, 'http_requests_total{method="POST",path="/score",status="200"}') == 3
    assert counted(done.stdout, "spam_propensity_count") == 3
