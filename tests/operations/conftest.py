"""What the tests of operations share: stores. Without requirements-operations.txt they are skipped."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from helpers import missing

from benchmarks.postgres import Postgres

HERE = Path(__file__).parent


class Skipped(pytest.Module):
    """A module of tests that cannot be imported."""

    def collect(self):
        pytest.skip("needs pip install -r requirements-operations.txt", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skip the modules where their requirements are not installed, unless this is a CI machine."""
    if importlib.util.find_spec("flask_smorest") is None and not os.environ.get("CI"):
        return Skipped.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.operations)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A running server of PostgreSQL."""
    folder = Path("/tmp" if os.getuid() == 0 else tmp_path_factory.getbasetemp()) / f"postgres-{os.getpid()}"
    folder.mkdir()
    try:
        server = Postgres(folder)
    except FileNotFoundError as error:
        folder.rmdir()
        missing(str(error))
    # Tests kill the server, not the machine, so nothing is lost that was not flushed; and to flush the files of all
    # tests before it answers again takes it 40 s.
    with open(folder / "data" / "postgresql.conf", "a") as settings:
        settings.write("fsync = off\n")
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request, tmp_path):
    """The address of an empty database, of SQLite and then of PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    name = "".join(c if c.isalnum() else "_" for c in f"{tmp_path.parent.name}_{tmp_path.name}".lower())
    return request.getfixturevalue("postgres").url(name[-60:])


@pytest.fixture
def store(store_url):
    """A store with its tables, and nothing in them."""
    from operations.store import migrate, open_store

    engine = open_store(store_url)
    migrate(engine)
    yield engine
    engine.dispose()
