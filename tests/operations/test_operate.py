"""All programs together, `python -m operations`: they start, go on, and end in order."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import requests
import sqlalchemy as sa
from helpers import SPAM, children, free_port, operated, poll

from operations.store import day_tables, days, open_store


def programs(process):
    """Return the process ids of the programs by name."""
    found = {}
    for child in children(process):
        _, *arguments = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        if arguments[:1] == ["-m"]:
            found[arguments[1].removeprefix("operations.")] = child
    return found


def is_alive(process_id):
    try:
        return "(zombie)" not in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return False


def test_what_is_scored_is_stored_and_acted_on_whatever_ends_or_dies(tmp_path):
    state = tmp_path / "state"
    with operated(state) as (process, url, token):
        score = partial(requests.post, f"{url}/score", timeout=10)
        taken_down = {score(json={"text": SPAM[0], "recipient": "x"}).json()["id"]}

        def are_taken_down():
            return {
                row["message"] for row in requests.get(f"{url}/takedowns", headers=token, timeout=10).json()
            } == taken_down

        poll(are_taken_down, "the first message to be taken down")
        for secret in ("token", "key"):
            assert (state / secret).stat().st_mode & 0o777 == 0o600
        second = [sys.executable, "-m", "operations"]
        refused = subprocess.run(
            second, env={**os.environ, "OPERATIONS_STATE": str(state)}, capture_output=True, text=True
        )
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"Cannot start: another one runs on {state}")
        before = programs(process)
        assert set(before) == {"web", "spool", "actions", "jobs"}
        os.kill(before["spool"], signal.SIGKILL)
        taken_down.add(score(json={"text": SPAM[0], "recipient": "x"}).json()["id"])
        poll(are_taken_down, "a new mover")
        names = {score(json={"text": "x"}).json()["id"] for _ in range(20)}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    engine = open_store(f"sqlite:///{state / 'store.db'}")
    with engine.connect() as connection:
        [day] = connection.scalars(sa.select(days.c.day))
        stored = dict(connection.execute(sa.select(day_tables(day)[1].c["message", "action"])).all())
    engine.dispose()
    assert {str(message) for message in stored} == names | taken_down
    assert None not in stored.values()
    assert not list((state / "spool").glob("*.jsonl"))


def test_programs_end_with_their_parent(tmp_path):
    state = tmp_path / "state"
    with operated(state) as (process, _, _):
        ids = poll(lambda: len(found := programs(process)) == 4 and found, "all programs").values()
        process.kill()
        poll(lambda: not any(map(is_alive, ids)), "all programs to end")


def test_a_service_that_cannot_start_ends_all_with_its_sentence(tmp_path):
    with operated(tmp_path / "first") as (_, url, _):
        environment = {"OPERATIONS_STATE": str(tmp_path / "second"), "PORT": url.rpartition(":")[2]}
        done = subprocess.run(
            [sys.executable, "-m", "operations"], env={**os.environ, **environment}, capture_output=True, text=True
        )
    assert done.returncode == 1
    assert done.stderr.count("Cannot serve on 127.0.0.1: ") == 1


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://x/y", "DATABASE_URL must begin with postgresql:// or sqlite:/// and name a database"),
        ("postgresql://nobody@/nothing?host=/nowhere", "connection to server on socket"),
    ],
)
def test_a_store_that_cannot_be_had_is_said_at_once(url, sentence, tmp_path):
    environment = {"OPERATIONS_STATE": str(tmp_path), "DATABASE_URL": url, "PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-m", "operations"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Cannot start: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
