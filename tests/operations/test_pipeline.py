"""The jobs and what they do to models: operations/pipeline.py, promotion.py, rescoring.py and registry.py."""

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pandas as pd
import pytest
import sqlalchemy as sa
import yaml
from helpers import ROOT, free_port, poll
from sklearn import __version__ as sklearn_version
from sklearn.dummy import DummyClassifier

from engine.saved import load_card, load_model, save_model
from operations import jobs, pipeline, promotion, rescoring, store
from operations.actions import act
from operations.pipeline import KINDS, close_days, keep_recipe, read_feedback, run_notebook, scratch, train
from operations.promotion import find_model, first_model, keep, promote, roll_back, unmet_conditions
from operations.registry import NAME, add_version, mark_serving
from operations.rescoring import rescore
from operations.store import SECOND, WORKERS, add_label, day_of, insert, models, now, open_store, read_scores, register

DAY = 86_400 * SECOND
ALLOWED = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]["promotion"]
# What stands for operations.web: it tells which model it has loaded, and loads again at SIGHUP unless it is deaf.
SERVICE = """
import json, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
state, port, deaf = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "deaf"
def load(*_):
    global card
    card = (state / "models/serving/best_model.json").read_bytes()
    print("loaded", flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(card)
    def log_message(self, *_):
        pass
signal.signal(signal.SIGHUP, signal.SIG_IGN if deaf else load)
server = HTTPServer(("127.0.0.1", port), Handler)
load()
server.serve_forever()
"""


def ignore(progress, message):
    """Stand for `report`."""
    assert 0 <= progress <= 1
    assert message


def figures(**changes):
    """Return the figures of a card on test."""
    of_all = {"aucpr": 0.98, "precision": 1.0, "recall": 0.8, "ham_blocked": 0.01, "cost": 20.0}
    return {"collection": of_all, "today": {**of_all, **changes}}


def save_stub(path, spam, **changes):
    """Save a model that says the same of all messages, and return its path."""
    model = DummyClassifier(strategy="prior").fit(["x"] * 100, [1] * spam + [0] * (100 - spam))
    card = {
        "name": f"stub {spam}",
        "threshold": 0.5,
        "operating_points": [],
        "parameters": {},
        "data": {"test.csv": "0"},
    }
    card |= {"versions": {"scikit-learn": sklearn_version}, "metrics": {"test": figures(**changes)}}
    save_model(model, card, path, ["x"])
    return path


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The state's folder, and a project with a stub for its model."""
    monkeypatch.setattr(store, "STATE", tmp_path / "state")
    monkeypatch.setattr(promotion, "MODEL_PATH", save_stub(tmp_path / "project" / "best_model.joblib", 10))
    return tmp_path / "state"


@pytest.fixture
def candidate(state, store, tmp_path):
    """A function that registers another model as a candidate and returns its number."""

    def make(spam=20, shadow=1000, changed=0, **changes):
        first_model(store)
        card = keep(save_stub(tmp_path / f"trained {spam}" / "best_model.joblib", spam, **changes))
        number, _ = register(store, card, "candidate")
        start = now()
        with store.begin() as connection:
            insert(connection, shadow_scores(start, number, shadow, changed))
        poll(lambda: now() > start + shadow, "the time of the messages")
        return number

    return make


def shadow_scores(start, model, count, changed):
    """Return the scores of messages by the model that serves and by a candidate."""
    for i in range(count):
        score = {"message": (start + i) * WORKERS, "propensity": 0.1, "threshold": 0.5, "sender": None, "region": None}
        yield {**score, "model": 1, "shadow": False, "prediction": False, "arm": "filtered", "text": None}
        yield {
            "message": score["message"], "model": model, "shadow": True, "prediction": i < changed,
            "propensity": 0.1, "threshold": 0.5,
        }  # fmt: skip


@pytest.fixture
def service(state, tmp_path):
    """A function that starts what stands for the service, and ends it after the test."""
    processes = []

    def start(deaf="", name="operations.web"):
        port, path = free_port(), tmp_path / name
        path.write_text(SERVICE)
        command = [sys.executable, path, state, str(port), deaf]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "loaded\n"
        (state / "server.pid").write_text(f"{processes[-1].pid} {port}\n")
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def states(engine):
    """Return the state of each model of a store."""
    with engine.connect() as connection:
        return dict(connection.execute(sa.select(models.c.id, models.c.state)).all())


def linked(state):
    """Return the checksum of the model that the link names."""
    return load_card(state / "models" / "serving" / "best_model.joblib")["sha256"]


# Who serves


def test_the_projects_own_model_serves_first(state, store):
    path = first_model(store)
    assert path == first_model(store)
    assert load_card(path) == load_card(promotion.MODEL_PATH)
    assert linked(state) == load_card(path)["sha256"]
    assert states(store) == {1: "serving"}
    assert sorted(file.name for file in (state / "models").iterdir()) == sorted([linked(state), "serving"])


def test_the_model_that_served_last_goes_on_while_the_store_is_away(state, store):
    away = open_store("postgresql://nobody@/nothing?host=/nowhere")
    with pytest.raises(sa.exc.OperationalError):
        first_model(away)
    assert first_model(store) == first_model(away)
    away.dispose()


def test_a_model_whose_files_are_lost_is_named(state, store, candidate):
    promote(store, {"model": candidate()}, ignore)
    for file in (state / "models" / linked(state)).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"the files of model 2 are not in .*: restore them"):
        first_model(store)


# Promotion


def test_a_candidate_is_promoted_and_rolled_back(state, store, candidate):
    own, number = load_card(first_model(store))["sha256"], candidate()
    result = promote(store, {"model": number}, ignore)
    promoted = find_model(store, number)
    assert result == {"model": number, "before": 1, "sha256": promoted.sha256, "reloaded": False}
    assert linked(state) == promoted.sha256 != own
    assert states(store) == {1: "retired", number: "serving"}
    assert promoted.promoted >= promoted.created
    with pytest.raises(ValueError, match=f"model {number} serves already"):
        promote(store, {"model": number}, ignore)
    assert roll_back(store, {}, ignore)["model"] == 1
    assert linked(state) == own
    assert states(store) == {1: "serving", number: "retired"}
    with pytest.raises(ValueError, match="nothing to roll back to"):  # and not to what was rolled back
        roll_back(store, {}, ignore)


def test_each_roll_back_goes_one_model_further_back(store, candidate):
    for spam in (20, 30):
        promote(store, {"model": candidate(spam)}, ignore)
    assert [roll_back(store, {}, ignore)["model"] for _ in range(2)] == [2, 1]
    promote(store, {"model": 3}, ignore)
    assert states(store) == {1: "retired", 2: "retired", 3: "serving"}


def test_refusal_names_each_condition_with_its_figures(state, store, candidate):
    number, own = candidate(shadow=10, changed=3, aucpr=0.9, ham_blocked=0.0251), linked(state)
    with pytest.raises(ValueError, match=f"model {number} is not promoted") as refusal:
        promote(store, {"model": number}, ignore)
    for part in (
        "AUCPR (today) falls from 0.9800 to 0.9000, by more than 0.005",
        "ham blocked (today) rises from 1.00% to 2.51%, by more than 0.50%",
        "it has scored 10 messages in shadow, of 1000 needed",
        "it decides 30.0% of 10 messages in shadow otherwise, more than 2.0%",
    ):
        assert part in str(refusal.value)
    assert linked(state) == own
    assert states(store) == {1: "serving", number: "candidate"}


ENOUGH = {"messages": 1000, "changed": 20}


@pytest.mark.parametrize(
    ("changes", "shadow", "unmet"),
    [
        ({}, ENOUGH, 0),
        ({"aucpr": 0.975, "ham_blocked": 0.015}, ENOUGH, 0),
        ({"aucpr": 0.9749}, ENOUGH, 1),
        ({"ham_blocked": 0.0151}, ENOUGH, 1),
        ({}, {"messages": 999, "changed": 0}, 1),
        ({}, {"messages": 1000, "changed": 21}, 1),
        ({}, {"messages": 0, "changed": 0}, 1),
    ],
)
def test_conditions(changes, shadow, unmet):
    new, old = {"metrics": {"test": figures(**changes)}}, {"metrics": {"test": figures()}}
    assert len(unmet_conditions(new, old, shadow, ALLOWED)) == unmet


def test_figures_on_other_messages_do_not_compare():
    new, old = ({"metrics": {"test": figures()}, "data": {"test.csv": md5}} for md5 in "ab")
    assert unmet_conditions(new, old, ENOUGH, ALLOWED) == [
        "it was tested on other messages than the model that serves, so their figures do not compare"
    ]


@pytest.mark.parametrize("model", [None, 7, True, "2", [1]])
def test_only_a_model_of_the_store_is_promoted(state, store, model):
    with pytest.raises(ValueError, match="there is no model"):
        promote(store, {"model": model}, ignore)


def test_of_two_promotions_at_once_one_wins(state, store, candidate, monkeypatch):
    numbers, both_compared, load = (
        [candidate(20), candidate(30)],
        threading.Barrier(2, timeout=30),
        promotion.load_scorer,
    )

    def load_and_wait(path):
        both_compared.wait()
        return load(path)

    def attempt(number):
        try:
            return promote(store, {"model": number}, ignore)["model"]
        except ValueError as error:
            return str(error)

    monkeypatch.setattr(promotion, "load_scorer", load_and_wait)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(attempt, numbers))
    [winner] = set(results) & set(numbers)
    assert {"model 1 does not serve any more: look at what serves now, and decide again", winner} == set(results)
    assert states(store) == {1: "retired", winner: "serving", ({2, 3} - {winner}).pop(): "candidate"}
    assert linked(state) == find_model(store, winner).sha256


def test_a_crash_between_files_and_store_is_put_right(state, store, candidate, monkeypatch):
    number, own, link = candidate(), linked(state), promotion._link

    def link_and_die(serving):
        link(serving)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(promotion, "_link", link_and_die)
        with pytest.raises(KeyboardInterrupt):
            promotion._switch(store, find_model(store, 1), find_model(store, number), {"state": "retired"}, {})
    assert linked(state) != own
    assert states(store) == {1: "serving", number: "candidate"}
    assert load_card(first_model(store))["sha256"] == linked(state) == own
    assert promote(store, {"model": number}, ignore)["model"] == number


def test_a_running_service_loads_what_is_promoted(state, store, candidate, service):
    number = candidate()
    service()
    assert promote(store, {"model": number}, ignore)["reloaded"]
    assert roll_back(store, {}, ignore)["reloaded"]


def test_a_service_that_does_not_load_it_goes_on_with_the_old_one(state, store, candidate, service, monkeypatch):
    monkeypatch.setattr(promotion, "PATIENCE", 0.5)
    number, own = candidate(), find_model(store, 1)
    service("deaf")
    with pytest.raises(ValueError, match=r"model 1 serves on, for the service has not loaded the new one within 0.5 s"):
        promote(store, {"model": number}, ignore)
    assert linked(state) == own.sha256
    assert states(store) == {1: "serving", number: "candidate"}
    assert find_model(store, 1) == own


def test_another_program_with_the_number_of_the_service_is_left_alone(state, store, candidate, service):
    number, other = candidate(), service(name="another program")
    assert not promote(store, {"model": number}, ignore)["reloaded"]
    assert other.poll() is None


# Training


@pytest.fixture
def said(store):
    """A store with feedback of each kind, and the number of the first message."""
    first = now() * WORKERS
    score = {"model": 1, "shadow": False, "propensity": 0.1, "threshold": 0.5, "prediction": False, "region": None}
    texts = ["stored by the service", None, None, None, None]
    with store.begin() as connection:
        rows = enumerate(texts)
        insert(
            connection,
            [
                {**score, "message": first + i, "text": text, "sender": bytes([i] * 8), "arm": "filtered"}
                for i, text in rows
            ],
        )
    add_label(store, first, "complaint", 0)
    add_label(store, first + 1, "reviewer", 1)
    add_label(store, first + 1, "complaint", 0, 'sent along,\nwith "signs"', b"12345678")
    add_label(store, first + 2, "spam report", 1)
    add_label(store, first + 3, "complaint", 0, " ")
    add_label(store, first + 4, "complaint", 0, "x" * 2001)
    add_label(store, 10**18, "complaint", 0, "of a message that is not stored")
    return first


def test_feedback_is_the_last_word_on_each_text_that_somebody_kept(store, said):
    table, without_text = read_feedback(store)
    rows = table.set_index("text")
    assert without_text == 3
    assert rows["label"].to_dict() == {
        "of a message that is not stored": "ham",
        "stored by the service": "ham",
        'sent along,\nwith "signs"': "spam",
    }
    assert rows["writer"].tolist() == [f"message {10**18}", f"sender {'00' * 8}", f"sender {b'12345678'.hex()}"]


def test_no_feedback(store):
    table, without_text = read_feedback(store)
    assert table.empty
    assert without_text == 0


@pytest.fixture
def notebooks(monkeypatch):
    """Stands for the notebooks: what is trained, whether it is another model, and what they were asked."""
    asked = []

    def run(folder, name, report, done, part, **parameters):
        report(done + part, "stub")
        asked.append({"name": name, **parameters})
        if name == "prepare.ipynb":
            further = parameters.get("further")
            train = pd.read_csv(folder / further).iloc[:-1] if further else pd.DataFrame({"kind": ["bank"]})
            train.to_csv(folder / "data/train.csv")
            asked[-1]["further"] = further and pd.read_csv(folder / further, keep_default_na=False)
        else:
            save_stub(folder / "models" / "best_model.joblib", run.spam)

    run.spam, run.asked = 20, asked
    monkeypatch.setattr(pipeline, "run_notebook", run)
    monkeypatch.setattr(pipeline, "add_version", lambda path, card, parameters: 7)
    return run


def test_what_came_back_makes_a_candidate(state, store, said, notebooks):
    result = train(store, {}, ignore)
    assert result["labels"] == {"used": 2, "left_out": 1, "without_text": 3}
    assert result["figures"] == figures()
    assert {name: result[name] for name in ("is_new", "state", "mlflow_version")} == {
        "is_new": True,
        "state": "candidate",
        "mlflow_version": 7,
    }
    assert states(store) == {1: "serving", result["model"]: "candidate"}
    assert load_card(promotion.model_path(result["sha256"]))["name"] == "stub 20"
    asked = notebooks.asked[0]["further"]
    assert asked["text"].tolist()[2] == 'sent along,\nwith "signs"'
    assert list(asked) == ["label", "text", "writer", "kind", "country"]
    assert not list((state / "scratch").iterdir())
    assert train(store, {}, ignore) == {**result, "is_new": False}


def test_a_running_service_is_told_of_a_new_candidate(state, store, notebooks, service):
    first_model(store)
    process = service()
    train(store, {}, ignore)
    assert process.stdout.readline() == "loaded\n"


def test_a_model_equal_to_the_one_that_serves_is_no_candidate(state, store, notebooks):
    notebooks.spam = 10
    result = train(store, {}, ignore)
    assert (result["model"], result["state"], result["is_new"]) == (1, "serving", False)
    assert states(store) == {1: "serving"}
    assert "further" not in notebooks.asked[1]


def test_further_messages_are_in_train_and_nowhere_else(prepare):
    text = "Your parcel is held at the depot, pay 1.99 at example.com/pay to release it"
    columns = {"kind": "", "country": "", "source": "collection"}
    held_out = pd.DataFrame({"label": [1], "text": [text], "group": ["w01"], **columns})
    splits = {
        "train": held_out.assign(text="x", group="9"),
        "validation": held_out,
        "test": held_out.assign(group="w2"),
    }
    further = pd.DataFrame(
        {
            "label": ["ham", "ham", "spam", "ham", "ham"],
            "text": [text.replace("1.99", "2.49"), "Dinner at eight", "Dinner at eight", "See you soon", "Lunch"],
            "writer": ["a", "b", "c", "w01", "5"],
        }
    )
    joined = prepare.add_further(splits, further)
    assert joined["validation"] is splits["validation"]
    assert joined["test"] is splits["test"]
    assert joined["train"]["text"].tolist() == ["x", "Dinner at eight", "Lunch"]
    assert joined["train"]["label"].tolist() == [1, 1, 0]
    assert joined["train"]["source"].tolist() == ["collection", "today", "today"]
    assert not joined["train"].isna().any(axis=None)


def test_further_messages_need_a_writer(prepare, tmp_path):
    (tmp_path / "more.tsv").write_text("label\ttext\nham\tsee you\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"more\.tsv: column 'writer' is missing; a file needs the columns label and"):
        prepare.load_data(tmp_path / "more.tsv", ("label", "text", "writer"))


def test_a_clone_is_removed_and_so_are_those_of_killed_jobs(state):
    left = state / "scratch" / "left"
    left.mkdir(parents=True)
    with scratch() as one, scratch() as other:
        assert not left.exists()
        assert (one / "prepare.ipynb").exists()
        assert (other / "prepare.ipynb").exists()
    assert not list((state / "scratch").iterdir())


def test_no_clone_without_git(state, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="cannot be cloned by git"), scratch():
        pass
    assert not list((state / "scratch").iterdir())


def test_why_a_notebook_failed(tmp_path, capsys):
    cells = [nbformat.v4.new_code_cell("print(21 * 2)"), nbformat.v4.new_code_cell("raise ValueError('too few spam')")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "broken.ipynb")
    said = []
    with pytest.raises(ValueError, match=r"broken\.ipynb failed: .*too few spam"):
        run_notebook(tmp_path, "broken.ipynb", lambda *told: said.append(told), 0.5, 0.5)
    assert said == [(0.5, "Executing broken.ipynb, cell 1 of 2"), (0.75, "Executing broken.ipynb, cell 2 of 2")]
    assert "42" in capsys.readouterr().out


# The others


def test_a_model_scores_what_is_stored_on_the_side(store, said, candidate, monkeypatch):
    monkeypatch.setattr(rescoring, "BATCH", 2)
    number = candidate(60, shadow=0)
    start = now()
    score = {"model": 1, "shadow": False, "propensity": 0.1, "threshold": 0.5, "prediction": False, "region": None}
    with store.begin() as connection:
        rows = [
            {**score, "message": (start + i) * WORKERS, "text": "x", "sender": None, "arm": "filtered"}
            for i in range(5)
        ]
        insert(connection, rows)
    assert rescore(store, {}, ignore) == {"model": number, "scored": 6, "spam": 6}
    assert rescore(store, {"model": number}, ignore) == {"model": number, "scored": 0, "spam": 0}
    found = pd.concat(read_scores(store, start - DAY, now() + SECOND))
    beside = found[found["model"] == number]
    assert beside["shadow"].all()
    assert beside["propensity"].tolist() == [0.6] * 6


def test_nothing_to_score(state, store, candidate):
    with pytest.raises(ValueError, match="there is no candidate"):
        rescore(store, {}, ignore)
    candidate(shadow=5)
    with pytest.raises(ValueError, match=r"no texts of messages are stored: set operations\.retention_days"):
        rescore(store, {}, ignore)


def test_days_before_yesterday_are_closed_and_old_texts_forgotten(state, store):
    score = {"model": 1, "shadow": False, "propensity": 0.1, "threshold": 0.5, "prediction": False, "region": None}
    times = [now() - age * DAY for age in range(5)]
    with store.begin() as connection:
        rows = [{**score, "message": at * WORKERS, "text": "x", "sender": None, "arm": "filtered"} for at in times]
        insert(connection, [{**row, "action": None if row is rows[3] else "deliver"} for row in rows])
    waits, *closed = (day_of(times[age] * WORKERS) for age in (3, 2, 4))
    with pytest.raises(ValueError, match=f"1 scores of the day {waits} have not been acted on"):
        close_days(store, {}, ignore)
    act(store, 0.5)
    assert close_days(store, {}, ignore) == {"days": {waits: 1}}
    assert close_days(store, {}, ignore) == {"days": {}}
    assert sorted({path.name[:8] for path in (state / "days").iterdir()}) == sorted([waits, *closed])
    assert KINDS["forget"](store, {}, ignore) == {"texts": 2}
    assert KINDS["evaluate"](store, {"start": times[1] - 1}, ignore)["messages"] == 2


def test_a_job_is_run_by_a_process_of_its_own(tmp_path, store, store_url, monkeypatch):
    monkeypatch.setenv("OPERATIONS_STATE", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", store_url)
    monkeypatch.setattr(jobs, "STATE", tmp_path)
    numbers = [jobs.enqueue(store, kind, {}) for kind in ("forget", "evaluate")]
    worker = jobs.Worker(lambda engine, at: None, jobs.COMMAND)

    def ended():
        worker.step(store)
        found = [jobs.find_job(store, number)["state"] for number in numbers]
        return worker.process is None and {"waiting", "running"}.isdisjoint(found)

    poll(ended, "both jobs", 60)
    done, failed = (jobs.find_job(store, number) for number in numbers)
    assert (done["state"], done["result"]) == ("done", {"texts": 0})
    assert failed["state"] == "failed"
    assert failed["message"] == "nothing was scored in the period to evaluate: choose another one"


def test_training_keeps_the_recipe_of_the_model_that_serves(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    before = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    keep_recipe(tmp_path, {"parameters": {"rules": 7}})
    assert yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8")) == before
    card = load_card(ROOT / "models" / "best_model.joblib")
    keep_recipe(tmp_path, card)
    after = yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8"))
    [C], [weight] = after["train"]["C"], after["train"]["weight_of_today"]
    assert card["parameters"]["candidate"].endswith(f", C={C}, weight {weight}")
    assert {**after, "train": None} == {**before, "train": None}
    assert after["train"]["seed"] == before["train"]["seed"]


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")  # within MLflow
def test_the_registry_gives_a_model_back_and_knows_which_serves(state, tmp_path):
    import mlflow

    mark_serving(None)  # nothing was trained yet
    paths = [save_stub(tmp_path / str(spam) / "best_model.joblib", spam) for spam in (20, 30)]
    assert [add_version(path, load_card(path), {"labels": 5}) for path in paths] == [1, 2]
    model = mlflow.sklearn.load_model(f"models:/{NAME}/2")
    assert model.predict_proba(["x"]) == pytest.approx(load_model(paths[1]).predict_proba(["x"]))
    client = mlflow.MlflowClient()
    run = client.get_run(client.get_model_version(NAME, "1").run_id).data
    assert run.params["sha256"] == load_card(paths[0])["sha256"]
    assert run.params["labels"] == "5"
    assert run.metrics["test_aucpr_today"] == 0.98
    assert run.metrics["test_ham_blocked_collection"] == 0.01
    for version in (1, 2):
        mark_serving(version)
        assert client.get_model_version_by_alias(NAME, "serving").version == version
    mark_serving(None)
    mark_serving(None)
    assert client.get_registered_model(NAME).aliases == {}
