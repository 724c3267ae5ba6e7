"""The loop from end to end: messages, complaints, labels, a candidate, its promotion, and the way back."""

import os
import re

import pytest
import requests
from helpers import operated, poll

from operations.story import NOTICES, tell


@pytest.fixture
def project(prepared, git, tmp_path):
    """A clone of the project that repeats the splits once, which this is not about and takes the longest."""
    git(tmp_path, "clone", "--quiet", str(prepared), "project")
    params = tmp_path / "project" / "params.yaml"
    text = params.read_text(encoding="utf-8")
    params.write_text(re.sub(r"(repeated_seeds:) \[.*\]", r"\1 [0]", text), encoding="utf-8")
    git(tmp_path / "project", "commit", "--quiet", "--no-verify", "--all", "--message", "Repeat the splits once")
    return tmp_path / "project"


def test_what_users_complain_of_is_learned_and_can_be_undone(prepared, project, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)  # what runs elsewhere is not what is measured here
    said = []
    with operated(tmp_path / "state", project, WORKERS="2") as (_, url, token):
        health = requests.get(f"{url}/health", timeout=10).json()
        told = tell(url, token["Authorization"].removeprefix("Bearer "), prepared / "data" / "test.csv", said.append)
        promoted = requests.get(f"{url}/health", timeout=10).json()
        requests.post(f"{url}/models/roll-back", headers=token, timeout=10).raise_for_status()
        poll(lambda: requests.get(f"{url}/health", timeout=10).json() == health, "the first model to be back", 90)
    assert told["notices_taken_down"] >= 10
    assert told["evaluation"]["messages"] == 1000
    assert told["evaluation"]["reported"]["missed"]["count"] == told["complaints"] > 0
    assert told["candidate"]["labels"]["used"] >= told["notices_taken_down"]
    assert promoted["sha256"] == told["candidate"]["sha256"] != health["sha256"]
    assert told["lost"] == 0 < told["answered"]
    assert told["before"] > NOTICES / 2
    assert told["after"] < told["before"] / 4
    assert len(said) == 7
