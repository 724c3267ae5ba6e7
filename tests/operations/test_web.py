"""The operator's service: operations/web.py, its routes and who may use them."""

import contextlib
import json
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import requests
import schemathesis
import sqlalchemy as sa
from helpers import HAM, SPAM, LengthModel, assert_refuses_to_serve, children, free_port, launched, poll, stub_card
from hypothesis import HealthCheck, given, settings
from limits import parse
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from engine.saved import save_model
from operations import access, jobs, web
from operations import store as operations_store
from operations.actions import act
from operations.spool import Recorder, move
from operations.store import WORKERS, close_day, day_of, drift, evaluations, labels, migrate, now, open_store, register
from score import load_card, load_model

TOKEN = "a token of the operator".replace(" ", "-")
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PARAMS = {
    "retention_days": 7,
    "feedback_days": 7,
    "experiment": "x",
    "shares": {"filtered": 1.0, "unfiltered": 0.0},
    "spool_bytes": 1e9,
    "shadow_share": 1.0,
}
CARD = stub_card(sha256="a" * 64, metrics={"test": {"today": {"aucpr": 0.9}}})
COMMAND = (sys.executable, "-m", "operations.web")
LISTS = ["/jobs", "/feedback", "/models", "/takedowns", "/evaluations", "/monitoring"]


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function that makes the service on a store, with a client of it."""
    for module in (jobs, operations_store):
        monkeypatch.setattr(module, "STATE", tmp_path)
    with contextlib.ExitStack() as stack:

        def make(engine, token=TOKEN, model=None, card=CARD, shadow=None, **params):
            recorder = Recorder(card, {**PARAMS, **params}, tmp_path / "spool", b"key", shadow)
            stack.callback(recorder.close)
            app = web.create_operations_app(engine, model or LengthModel(), card, recorder, token)
            client = app.test_client()
            client.environ_base["HTTP_AUTHORIZATION"] = HEADERS["Authorization"]

            def store():
                move(engine, tmp_path / "spool")
                act(engine, 0.5)

            return SimpleNamespace(app=app, client=client, store=store)

        yield make


@pytest.fixture
def light_store(tmp_path):
    """A store in SQLite, where it does not matter in what."""
    engine = open_store(f"sqlite:///{tmp_path / 'light.db'}")
    migrate(engine)
    yield engine
    engine.dispose()


def send(client, message, source="complaint", **fields):
    return client.post("/feedback", json={"message": message, "source": source, **fields})


# Who may


def test_without_a_token_there_are_no_routes(light_store, serve):
    client = serve(light_store, token=None).client
    assert {client.get(path).status_code for path in [*LISTS, "/operations", "/operations/openapi.json"]} == {404}
    assert {client.post(path).status_code for path in ("/train", "/feedback")} == {404}
    assert client.post("/score", json={"text": "hi"}).json["id"].isdecimal()


@pytest.mark.parametrize("value", [None, "", TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", "Bearer \xff"])
def test_a_wrong_token_is_refused(light_store, serve, value):
    client = serve(light_store).client
    del client.environ_base["HTTP_AUTHORIZATION"]
    headers = {} if value is None else {"Authorization": value}
    for answer in (client.get("/models", headers=headers), client.post("/train", headers=headers)):
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].lower().startswith("bearer")
        assert "token" in answer.json["error"]
    assert jobs.list_jobs(light_store) == []
    assert client.get("/models", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert client.get("/operations").status_code == 200


def test_who_guesses_is_shut_out_and_others_are_not(light_store, serve):
    client = serve(light_store).client
    wrong = {"Authorization": "Bearer wrong"}
    assert [client.get("/models", headers=wrong).status_code for _ in range(12)] == [401] * 10 + [429] * 2
    answer = client.get("/models")
    assert answer.status_code == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 60
    assert "too many wrong tokens" in answer.json["error"]
    assert client.get("/models", environ_base={"REMOTE_ADDR": "10.0.0.1"}).status_code == 200
    assert client.post("/score", json={"text": "hi"}).status_code == 200


@pytest.mark.parametrize(
    ("limit", "method", "path"),
    [("READS", "GET", "/jobs"), ("ORDERS", "POST", "/train"), ("FEEDBACK", "POST", "/feedback")],
)
def test_requests_are_limited(light_store, serve, monkeypatch, limit, method, path):
    monkeypatch.setattr(access, limit, parse("2/minute"))
    client = serve(light_store).client
    assert [client.open(path, method=method).status_code == 429 for _ in range(4)] == [False, False, True, True]
    assert client.delete("/jobs/1").status_code == (429 if limit == "ORDERS" else 404)


# Orders


@pytest.mark.parametrize(
    ("path", "fields", "kind", "arguments"),
    [
        ("/prepare", None, "prepare", {}),
        ("/train", {}, "train", {}),
        ("/evaluate", None, "evaluate", {}),
        (
            "/evaluate",
            {"start": "1970-01-01T02:00:00.000001+01:00", "end": "1970-01-01T02:00"},
            "evaluate",
            {"start": 3_600_000_001, "end": 7_200_000_000},
        ),
        ("/monitor", {"start": "1970-01-01T01:00Z"}, "monitor", {"start": 3_600_000_000}),
        ("/score/stored", None, "rescore", {}),
        ("/score/stored", {"model": 1}, "rescore", {"model": 1}),
        ("/models/1/promote", None, "promote", {"model": 1}),
        ("/models/roll-back", None, "roll_back", {}),
    ],
)
def test_an_order_becomes_a_job(light_store, serve, path, fields, kind, arguments, tmp_path):
    register(light_store, CARD, "serving")
    client = serve(light_store).client
    answer = client.post(path, json=fields) if fields is not None else client.post(path)
    assert answer.status_code == 202, answer.text
    assert (answer.json["kind"], answer.json["arguments"], answer.json["state"]) == (kind, arguments, "waiting")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / f"{answer.json['id']}.log").write_text("a line\n")
    assert client.get(answer.headers["Location"]).json == {**answer.json, "log": "a line\n"}
    assert client.get("/jobs").json == [answer.json]
    assert answer.json["created"].endswith("+00:00")


@pytest.mark.parametrize(
    ("method", "path", "fields", "status", "says"),
    [
        ("POST", "/models/7/promote", None, 404, "there is no model 7"),
        ("POST", f"/models/{2**63}/promote", None, 404, "not found"),
        ("POST", "/score/stored", {"model": 7}, 404, "there is no model 7"),
        ("POST", "/score/stored", {"model": 1.5}, 400, "model: Not a valid integer."),
        ("POST", "/evaluate", {"start": "yesterday"}, 400, "start: Not a valid datetime."),
        ("POST", "/evaluate", {"start": "2026-01-02", "end": "2026-01-01T00:00"}, 400, "start"),
        (
            "POST",
            "/evaluate",
            {"start": "2026-01-02T00:00", "end": "2026-01-01T00:00"},
            400,
            "start must be before end",
        ),
        ("POST", "/evaluate", {"colour": "red"}, 400, "colour: Unknown field."),
        ("POST", "/evaluate", [], 400, "must be a JSON object"),
        ("GET", "/jobs/7", None, 404, "there is no job 7"),
        ("DELETE", "/jobs/7", None, 404, "there is no job 7"),
        ("GET", "/jobs?limit=1000", None, 400, "limit: Must be"),
        ("GET", "/takedowns?limit=x", None, 400, "limit: Not a valid integer."),
        ("GET", "/train", None, 405, "method"),
        ("POST", "/feedback", None, 400, "message: Missing data for required field."),
        ("POST", "/feedback", {"message": 12, "source": "complaint"}, 400, "message: Not a valid string."),
        ("POST", "/feedback", {"message": "x", "source": "complaint"}, 400, "message: Not the id of a message."),
        ("POST", "/feedback", {"message": "12", "source": "gossip"}, 400, "source: Must be one of: complaint"),
        ("POST", "/feedback", {"message": "12", "source": "reviewer"}, 400, "label must be there for a reviewer"),
        ("POST", "/feedback", {"message": "12", "source": "complaint", "label": "ham"}, 400, "label must be there"),
        ("POST", "/feedback", {"message": "12", "source": "complaint"}, 404, "there is no message 12"),
        ("POST", "/feedback", {"message": "9" * 19, "source": "complaint"}, 404, "there is no message 9999"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(light_store, serve, method, path, fields, status, says):
    answer = serve(light_store).client.open(path, method=method, **({} if fields is None else {"json": fields}))
    assert answer.status_code == status
    assert list(answer.json) == ["error"]
    assert says in answer.json["error"]
    assert jobs.list_jobs(light_store) == []


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 10_000, "application/json", 400),
        (b"{}" + b" " * 2**17, "application/json", 413),
        (b"message=12&source=complaint", "application/x-www-form-urlencoded", 415),
    ],
)
def test_bad_bodies(light_store, serve, body, content_type, status):
    answer = serve(light_store).client.post("/feedback", data=body, content_type=content_type)
    assert (answer.status_code, list(answer.json)) == (status, ["error"])


def test_a_job_is_cancelled_once(light_store, serve):
    client = serve(light_store).client
    path = client.post("/train").headers["Location"]
    assert client.delete(path).json["state"] == "cancelled"
    answer = client.delete(path)
    assert (answer.status_code, answer.json) == (
        409,
        {"error": "job 1 is over, so it cannot be cancelled: it is cancelled"},
    )


# Feedback, and what the page shows


def test_feedback_is_taken_before_and_after_the_message_is_stored(store, serve):
    service = serve(store)
    message = service.client.post("/score", json={"text": "x" * 95, "sender": "me", "region": "north"}).json["id"]
    answer = send(service.client, message, text="caf\u00e9 \x00 \ud800")
    assert answer.status_code == 201
    assert answer.json == {"message": message, "source": "complaint", "label": "ham"}
    [listed] = service.client.get("/feedback").json
    assert (listed["text"], listed["scored"]) == ("caf\u00e9 \ufffd ?", None)
    service.store()
    assert send(service.client, message).status_code == 200
    assert send(service.client, message, "reviewer", label="spam").status_code == 201
    assert send(service.client, message, "spam report").json["label"] == "spam"
    said = service.client.get("/feedback?limit=2").json
    assert [(each["source"], each["label"]) for each in said] == [("spam report", "spam"), ("reviewer", "spam")]
    decision = {"propensity": 0.95, "threshold": 0.5, "prediction": True, "action": "take down", "region": "north"}
    assert said[0]["scored"] == {**decision, "model": 1}
    close_day(store, day_of(int(message)))
    assert service.client.get("/feedback?limit=2").json == said
    with store.connect() as connection:
        assert None not in connection.scalars(sa.select(labels.c.sender)).all()


@pytest.mark.parametrize(("days", "kept"), [(7, "x"), (0, None)])
def test_a_text_of_feedback_is_kept_only_where_it_may_be(days, kept, light_store, serve):
    service = serve(light_store, feedback_days=days)
    name = service.client.post("/score", json={"text": "x"}).json["id"]
    assert send(service.client, name, text="x").status_code == 201
    assert service.client.get("/feedback").json[0]["text"] == kept


def test_a_text_of_feedback_is_as_long_as_one_to_score(light_store, serve):
    client = serve(light_store).client
    message = client.post("/score", json={"text": "hi"}).json["id"]
    assert send(client, message, text="x" * 10_001).status_code == 413
    assert send(client, message, text="x" * 10_000).status_code == 201


def test_takedowns_are_shown_with_the_words_that_did_it(store, serve):
    card = load_card()
    service = serve(store, model=load_model(), card=card)
    names = [service.client.post("/score", json={"text": text}).json["id"] for text in [*SPAM, *HAM]]
    service.store()
    shown = service.client.get("/takedowns").json
    assert [each["message"] for each in shown] == names[2::-1]
    assert shown[0]["text"] == SPAM[2]
    assert {"FREE", "150p"} <= {reason["word"] for reason in shown[0]["why"]}
    assert shown[0]["why"][0]["log_odds"] == max(reason["log_odds"] for reason in shown[0]["why"]) > 0
    assert abs(int(shown[0]["message"]) // WORKERS - now()) < 60 * 10**6
    assert len(service.client.get("/takedowns?limit=1").json) == 1
    # Another model does not know why this one took them down.
    other = {**card, "sha256": "c" * 64}
    [after] = serve(store, model=load_model(), card=other).client.get("/takedowns?limit=1").json
    assert after["why"] is None


def test_takedowns_without_texts_or_reasons(light_store, serve):
    service = serve(light_store, retention_days=0)
    service.client.post("/score", json={"text": "x" * 80})
    service.store()
    [shown] = service.client.get("/takedowns").json
    assert (shown["text"], shown["why"], shown["propensity"]) == (None, None, 0.8)


def test_models_are_shown_with_their_figures_and_a_candidate_with_what_it_would_change(store, serve):
    service = serve(store, shadow=(LengthModel(), stub_card(sha256="b" * 64, threshold=0.3)))
    texts = ["x" * 20] * 3 + ["x" * 40] * 2 + ["x" * 60]
    assert service.client.post("/score/batch", json={"texts": texts}).status_code == 200
    service.store()
    candidate, served = service.client.get("/models").json
    assert (candidate["state"], served["state"]) == ("candidate", "serving")
    assert candidate["shadow"] == {"messages": 6, "changed": 2}
    assert served["shadow"] is None
    assert served["metrics"] == CARD["metrics"]
    assert served["promoted"] == served["created"]


def test_evaluations_are_shown(light_store, serve):
    with light_store.begin() as connection:
        values = {"created": 3, "start": 0, "end": 2, "result": json.dumps({"messages": 7})}
        connection.execute(evaluations.insert().values(**values))
    [shown] = serve(light_store).client.get("/evaluations").json
    assert shown["result"] == {"messages": 7}
    assert shown["end"] == "1970-01-01T00:00:00.000002+00:00"


def test_what_monitoring_found_is_shown_and_told_to_prometheus(light_store, serve):
    client = serve(light_store).client
    assert "spam_monitored" not in client.get("/operations/metrics").text
    evaluation = {"estimated": None, "reported": {"missed": None, "spam": None}, "regions": {"north": {}}}
    result = {"alarms": {"drift of digits": "x"}, "drift": [], "segments": [], "evaluation": evaluation}
    result |= {"expected_precision": None, "streams": {"propensities": [0.5]}}
    with light_store.begin() as connection:
        values = {"created": 3, "start": 0, "end": 2, "model": 1, "result": json.dumps(result)}
        connection.execute(drift.insert().values(**values))
    [shown] = client.get("/monitoring").json
    assert shown["result"]["alarms"] == {"drift of digits": "x"}
    assert "streams" not in shown["result"]
    assert "regions" not in shown["result"]["evaluation"]
    answer = client.get("/operations/metrics")
    assert answer.content_type.startswith("text/plain; version=")
    assert 'spam_alarm{alarm="drift of digits"} 1.0' in answer.text
    assert client.get("/operations/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401


# Faults


@pytest.mark.parametrize("url", ["sqlite:///{}/new.db", "postgresql://nobody@/none?host={}"])
def test_without_the_store_messages_are_scored_all_the_same(serve, tmp_path, url):
    engine = open_store(url.format(tmp_path), patience=1)
    client = serve(engine).client
    for answer in (client.get("/models"), client.post("/train"), send(client, "12")):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        assert "the store does not answer" in answer.json["error"]
    assert client.post("/score", json={"text": "hi"}).status_code == 200
    engine.dispose()


def test_the_store_goes_away_and_comes_back(postgres, serve):
    engine = open_store(postgres.url("away_from_web"), patience=1)
    migrate(engine)
    client = serve(engine).client
    message = client.post("/score", json={"text": "hi"}).json["id"]
    assert client.get("/jobs").status_code == 200
    postgres.kill()
    try:
        statuses = [client.get("/jobs").status_code, send(client, message).status_code]
        scored = client.post("/score", json={"text": "hi"}).status_code
    finally:
        postgres.start()
    assert (statuses, scored) == ([503, 503], 200)
    assert send(client, message).status_code == 201
    engine.dispose()


def test_a_store_that_hangs_holds_up_neither_scoring_nor_writing(light_store, serve, monkeypatch):
    service, goes_on = serve(light_store), threading.Event()
    monkeypatch.setattr(jobs, "list_jobs", lambda *_: goes_on.wait(30) and [])

    def read(_):
        return service.app.test_client().get("/jobs", headers=HEADERS).status_code

    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(read, i) for i in range(20)]
        poll(lambda: any(answer.done() for answer in answers), "one request too many")
        assert service.client.post("/score", json={"text": "hi"}).status_code == 200
        assert service.client.post("/train").status_code == 202
        goes_on.set()
        statuses = [answer.result() for answer in answers]
    assert statuses.count(200) == 17
    assert statuses.count(503) == 3


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis(light_store, serve, monkeypatch, mode):
    for limit in ("READS", "ORDERS", "WRONG_TOKENS"):
        monkeypatch.setattr(access, limit, parse("100000/minute"))
    app = serve(light_store).app
    register(light_store, CARD, "serving")
    schema = schemathesis.openapi.from_wsgi("/operations/openapi.json", app)
    found = [operation.ok() for operation in schema.get_all_operations()]
    assert len(found) == 17
    for operation in found:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=5, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        def check(case):
            # OpenAPI cannot say that a period must begin before it ends.
            case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])

        check()


# The program


@pytest.fixture
def environment(tmp_path, light_store):
    """The environment of a service with a state of its own."""
    return {
        "OPERATIONS_STATE": str(tmp_path),
        "DATABASE_URL": light_store.url.render_as_string(),
        "OPERATIONS_TOKEN": TOKEN,
        "OPERATIONS_KEY": "k" * 16,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"OPERATIONS_KEY": ""}, "OPERATIONS_KEY is missing"),
        ({"OPERATIONS_TOKEN": "short"}, "OPERATIONS_TOKEN must have at least 16 letters"),
        ({"DATABASE_URL": "sqlite:///{}/new.db"}, "have version none"),
        ({"DATABASE_URL": "postgresql://nobody@/none?host={}"}, "no model has served yet"),
        ({"DATABASE_URL": "mysql://x/y"}, "DATABASE_URL must begin with"),
    ],
)
def test_what_keeps_it_from_serving_is_said(environment, tmp_path, change, message):
    environment |= {name: value.format(tmp_path) for name, value in change.items()}
    assert_refuses_to_serve(message, *COMMAND, PORT=str(free_port()), **environment)
    assert not (tmp_path / "server.pid").exists()


def test_it_serves_by_several_workers_and_takes_a_candidate_in(environment, light_store, tmp_path):
    answers = set()
    with launched(*COMMAND, WORKERS="2", **environment) as (process, url):
        assert (tmp_path / "server.pid").read_text().split() == [str(process.pid), url.rpartition(":")[2]]
        spam = {"text": SPAM[0], "recipient": "user 1"}  # whose messages are filtered
        for _ in range(20):  # each by a connection of its own, so by either worker
            answers.add(requests.post(f"{url}/score", json=spam, timeout=5).json()["id"])
        assert len({int(answer) % WORKERS for answer in answers}) == 2
        assert move(light_store, tmp_path / "spool") == 20
        act(light_store, 0.5)
        said = {"message": min(answers), "source": "complaint"}
        assert requests.post(f"{url}/feedback", json=said, headers=HEADERS, timeout=5).status_code == 201
        assert len(requests.get(f"{url}/takedowns", headers=HEADERS, timeout=5).json()) == 20
        assert_refuses_to_serve("another process serves", *COMMAND, PORT=str(free_port()), **environment)

        path = tmp_path / "models" / "candidate" / "best_model.joblib"
        path.parent.mkdir()
        save_model(load_model(), {**load_card(), "name": "candidate"}, path, HAM)
        card = load_card(path)
        path.parent.rename(tmp_path / "models" / card["sha256"])
        number, _ = register(light_store, card, "candidate")
        before = set(children(process))
        process.send_signal(signal.SIGHUP)
        poll(lambda: len(found := set(children(process))) == 2 and not found & before, "two successors")
        texts = HAM * 100
        assert requests.post(f"{url}/score/batch", json={"texts": texts}, timeout=10).status_code == 200
        move(light_store, tmp_path / "spool")
        shown = requests.get(f"{url}/models", headers=HEADERS, timeout=5).json()
        assert shown[0]["id"] == number
        assert shown[0]["shadow"]["messages"] > 0
        assert shown[0]["shadow"]["changed"] == 0
    assert not (tmp_path / "server.pid").exists()


def test_a_candidate_that_cannot_be_loaded_is_left_out(light_store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operations_store, "STATE", tmp_path)
    assert web.load_candidate(light_store) is None
    register(light_store, CARD, "candidate")
    assert web.load_candidate(light_store) is None
    assert "does not score on the side" in capsys.readouterr().err
