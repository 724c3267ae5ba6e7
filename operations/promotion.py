"""Which model serves, and how another one takes its place: promote under conditions, and roll back.

Each model lies in a folder of its own, `models/<sha256>/` of the state, which never changes, so that nobody reads the
card of one and the file of another. The store says which of them serves; the link `models/serving` follows it, and is
put right, should a crash have come between, whenever the service starts or a model is promoted or rolled back.
"""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import sqlalchemy as sa
import yaml
from sqlalchemy.exc import DBAPIError

from engine.saved import MODEL_PATH, copy_files, load_card, load_model, load_scorer
from operations import store
from operations.registry import mark_serving
from operations.store import count_shadow, models, now, reader, register

SERVICE = "operations.web"  # how its process is known
PATIENCE = 60  # seconds for the service to load another model
TICK = 0.1  # seconds


# Files


def model_path(sha256: str) -> Path:
    """Return the path of a model in the state's folder, the card of which lies beside it."""
    return store.STATE / "models" / sha256 / MODEL_PATH.name


def keep(path: Path) -> dict[str, Any]:
    """Copy the files of a saved model to a folder of their own, unless they lie there, and return the card."""
    card = load_card(path)
    folder = model_path(card["sha256"]).parent
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="new-"))
        try:
            copy_files(path, temporary / MODEL_PATH.name)
            load_model(temporary / MODEL_PATH.name)  # or it would be refused later
            load_scorer(temporary / MODEL_PATH.name)
            temporary.chmod(0o755)
            with suppress(FileExistsError):  # another job was faster
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return card


def _link(serving: sa.Row) -> None:
    """Let the link follow the store."""
    link, temporary = (store.STATE / "models" / name for name in ("serving", f"serving.{os.getpid()}"))
    if not model_path(serving.sha256).exists():
        raise ValueError(f"the files of model {serving.id} are not in {link.parent}: restore them from a backup")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(serving.sha256)
    temporary.replace(link)


# Who serves


def first_model(engine: sa.Engine) -> Path:
    """Return the path of the model that serves; where none does yet, the project's own begins.

    While the store is away, the model that served last goes on.

    Raises:
        ValueError: its files are missing.
        sqlalchemy.exc.DBAPIError: the store is away, and no model has served yet.
    """
    link = store.STATE / "models" / "serving"
    try:
        with reader(engine).connect() as connection:
            is_first = _serving(connection) is None
        if is_first or not link.exists():
            card = keep(MODEL_PATH)
        if is_first:
            register(engine, card, "serving")
        with _alone(engine) as connection:
            serving = _serving(connection)
            _link(serving)
            return model_path(serving.sha256)
    except DBAPIError:
        if not link.exists():
            raise
        return model_path(link.resolve().name)


def find_model(engine: sa.Engine, model: Any) -> sa.Row:
    """Return the row of a model in the store; ValueError if there is none of that number."""
    found = None
    if isinstance(model, int) and not isinstance(model, bool):
        with reader(engine).connect() as connection:
            found = connection.execute(sa.select(models).where(models.c.id == model)).one_or_none()
    if found is None:
        raise ValueError(f"there is no model {model!r}: give the number of one that is in the store")
    return found


def find_candidate(engine: sa.Engine) -> sa.Row | None:
    """Return the row of the newest candidate in the store, or None."""
    candidates = sa.select(models).where(models.c.state == "candidate").order_by(models.c.id.desc()).limit(1)
    with reader(engine).connect() as connection:
        return connection.execute(candidates).one_or_none()


def _serving(connection: sa.Connection) -> sa.Row | None:
    """Return the row of the model that serves."""
    return connection.execute(sa.select(models).where(models.c.state == "serving")).one_or_none()


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Begin a transaction in which nobody else changes which model serves."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(20261125)"))
        yield connection


def _switch(engine: sa.Engine, old: sa.Row, new: sa.Row, of_old: dict[str, Any], of_new: dict[str, Any]) -> None:
    """Let one model serve in the place of another, and store what has changed of each.

    Raises:
        ValueError: the old one does not serve any more.
    """
    with _alone(engine) as connection:
        if _serving(connection).id != old.id:
            raise ValueError(f"model {old.id} does not serve any more: look at what serves now, and decide again")
        connection.execute(models.update().where(models.c.id == old.id).values(**of_old))
        connection.execute(models.update().where(models.c.id == new.id).values(state="serving", **of_new))
        _link(new)


def _replace(
    engine: sa.Engine, old: sa.Row, new: sa.Row, of_old: dict[str, Any], of_new: dict[str, Any]
) -> dict[str, Any]:
    """Switch, and have a running service load the new model; if it does not, the old one is put back.

    Returns:
        "model", "before" (their numbers), "sha256" and "reloaded", whether a service was running.
    """
    load_scorer(model_path(new.sha256))
    _switch(engine, old, new, of_old, of_new)
    try:
        reloaded = reload_service(new.sha256)
    except TimeoutError as error:
        _switch(engine, new, old, {"state": new.state, "promoted": new.promoted}, {"promoted": old.promoted})
        with suppress(TimeoutError):
            reload_service(old.sha256)
        raise ValueError(f"model {old.id} serves on, for {error}") from error
    mark_serving(new.mlflow_version)
    return {"model": new.id, "before": old.id, "sha256": new.sha256, "reloaded": reloaded}


def reload_service(sha256: str) -> bool:
    """Have a running service load the model that serves and the newest candidate, and wait until it answers.

    Args:
        sha256: of the model that serves.

    Returns:
        Whether a service is running.

    Raises:
        TimeoutError: it goes on with another model.
    """
    try:
        process, port = map(int, (store.STATE / "server.pid").read_text().split())
        if SERVICE.encode() not in Path(f"/proc/{process}/cmdline").read_bytes():
            return False  # the number has gone to another program
        os.kill(process, signal.SIGHUP)
    except (OSError, ValueError):
        return False
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            if json.load(answer)["sha256"] == sha256:
                return True
        time.sleep(TICK)
    raise TimeoutError(f"the service has not loaded the new one within {PATIENCE} s: its log says why")


# Jobs


def promote(engine: sa.Engine, arguments: dict[str, Any], report: Callable[[float, str], None]) -> dict[str, Any]:
    """Let a candidate serve, if it meets the conditions of params.yaml.

    Args:
        engine: of the store.
        arguments: "model", the number of the candidate.
        report: is told how far the job is.

    Returns:
        "model", "before" (their numbers), "sha256" and "reloaded", whether a service was running.

    Raises:
        ValueError: it does not meet them, each with its figures; or another model serves by now; or the service does
            not load it, and goes on with the old one.
    """
    first_model(engine)
    new = find_model(engine, arguments.get("model"))
    with reader(engine).connect() as connection:
        old = _serving(connection)
    if new.id == old.id:
        raise ValueError(f"model {new.id} serves already")
    report(0.1, f"Comparing model {new.id} with model {old.id}")
    params = yaml.safe_load((store.ROOT / "params.yaml").read_text(encoding="utf-8"))["operations"]["promotion"]
    shadow = count_shadow(engine, new.id, new.created)
    unmet = unmet_conditions(json.loads(new.card), json.loads(old.card), shadow, params)
    if unmet:
        raise ValueError(f"model {new.id} is not promoted: {'; '.join(unmet)}")
    report(0.5, f"Model {new.id} takes the place of model {old.id}")
    return _replace(engine, old, new, {"state": "retired"}, {"promoted": now()})


def unmet_conditions(
    new: dict[str, Any], old: dict[str, Any], shadow: dict[str, int], allowed: dict[str, float]
) -> list[str]:
    """Return in words, with figures, what speaks against promoting a model.

    Args:
        new, old: cards of the candidate and of the model that serves.
        shadow: "messages" that the candidate scored beside it, and those of them that it "changed".
        allowed: the section `operations.promotion` of params.yaml.
    """
    if new.get("data", {}).get("test.csv") != old.get("data", {}).get("test.csv"):
        return ["it was tested on other messages than the model that serves, so their figures do not compare"]
    unmet = []
    for source, of_old in old["metrics"]["test"].items():
        of_new = new["metrics"]["test"][source]
        most = allowed[f"aucpr_{source}"]
        if round(of_old["aucpr"] - of_new["aucpr"], 6) > most:
            fall = f"from {of_old['aucpr']:.4f} to {of_new['aucpr']:.4f}"
            unmet.append(f"AUCPR ({source}) falls {fall}, by more than {most}")
        if round(of_new["ham_blocked"] - of_old["ham_blocked"], 6) > allowed["ham_blocked"]:
            rise = f"from {of_old['ham_blocked']:.2%} to {of_new['ham_blocked']:.2%}"
            unmet.append(f"ham blocked ({source}) rises {rise}, by more than {allowed['ham_blocked']:.2%}")
    messages, changed = shadow["messages"], shadow["changed"]
    if messages < allowed["shadow_messages"]:
        unmet.append(f"it has scored {messages} messages in shadow, of {allowed['shadow_messages']} needed")
    if changed > allowed["shadow_changed"] * messages:
        share = f"{changed / messages:.1%} of {messages}"
        unmet.append(f"it decides {share} messages in shadow otherwise, more than {allowed['shadow_changed']:.1%}")
    return unmet


def roll_back(engine: sa.Engine, arguments: dict[str, Any], report: Callable[[float, str], None]) -> dict[str, Any]:
    """Let the model serve again that served before the present one.

    Args and Returns: as `promote`, without "model".

    Raises:
        ValueError: there is none; or another model serves by now; or the service does not load it.
    """
    first_model(engine)
    before = models.c.state == "retired", models.c.promoted.is_not(None)
    with reader(engine).connect() as connection:
        old = _serving(connection)
        new = connection.execute(sa.select(models).where(*before).order_by(models.c.promoted.desc())).first()
    if new is None:
        raise ValueError(f"there is nothing to roll back to: no model served before model {old.id}")
    report(0.5, f"Model {new.id} takes the place of model {old.id}")
    return _replace(engine, old, new, {"state": "retired", "promoted": None}, {})  # never to be rolled back to
