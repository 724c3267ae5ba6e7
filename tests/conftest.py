"""What the test modules share: the functions of the notebooks, and clones of the project to run them in."""

import os
import shutil
import signal
import subprocess
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, code_cells, missing, poll, run_notebook


def pytest_collection_modifyitems(items):
    """Mark the tests that wait for a notebook to be executed."""
    for item in items:
        if {"prepared", "trained"} & set(item.fixturenames):
            item.add_marker(pytest.mark.notebook)


@pytest.fixture(scope="session")
def definitions():
    """A function that returns what the cells tagged "definitions" of a notebook define."""

    def define(name):
        namespace = {"__name__": name}
        for cell in code_cells(ROOT / name):
            if "definitions" in cell["metadata"].get("tags", []):
                exec(compile("".join(cell["source"]), name, "exec"), namespace)
        return SimpleNamespace(**namespace)

    return define


@pytest.fixture(scope="session")
def prepare(definitions):
    """The functions of prepare.ipynb."""
    return definitions("prepare.ipynb")


@pytest.fixture(scope="session")
def train(definitions):
    """The functions of train.ipynb."""
    return definitions("train.ipynb")


@pytest.fixture(scope="session")
def git():
    """A function that runs git in a folder as somebody and returns what it prints."""

    def call(folder, *arguments):
        identity = ["-c", "user.name=A Student", "-c", "user.email=student@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return call


@pytest.fixture(scope="session")
def clone(git):
    """A function that clones the project to a folder, with the uncommitted changes of its work tree."""

    def make(folder):
        git(ROOT, "clone", "--quiet", str(ROOT), str(folder))
        changed = git(ROOT, "diff", "--name-only", "--no-renames", "-z", "HEAD")
        new = git(ROOT, "ls-files", "--others", "--exclude-standard", "-z")
        for name in filter(None, f"{changed}\0{new}".split("\0")):
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
            else:
                (folder / name).unlink()
        if git(folder, "status", "--porcelain"):
            git(folder, "add", "--all")
            git(folder, "commit", "--quiet", "--no-verify", "--message", "As it is in the work tree")
        return folder

    return make


@pytest.fixture(scope="session")
def prepared(clone, tmp_path_factory):
    """A clone in which prepare.ipynb was run, so that it has the data."""
    folder = clone(tmp_path_factory.mktemp("prepared") / "clone")
    done, _ = run_notebook(folder / "prepare.ipynb", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def trained(prepared):
    """The clone, in which train.ipynb was run too, without the transformer."""
    done, _ = run_notebook(prepared / "train.ipynb", prepared)
    assert done.returncode == 0, done.stderr[-3000:]
    return prepared


# Stores of operations


class Postgres:
    """A server of PostgreSQL of one's own, which listens in its folder alone."""

    def __init__(self, folder: Path):
        programs = sorted(glob("/usr/lib/postgresql/*/bin")) or missing("PostgreSQL is not installed")
        self.programs, self.folder, self.process = Path(programs[-1]), folder, None
        self.user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        if self.user:
            shutil.chown(folder, "postgres", "postgres")
        self.run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--pgdata", folder / "data")

    def run(self, program, *arguments):
        """Run one of its programs to its end."""
        command = [*self.user, self.programs / program, *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def start(self):
        """Start the server and wait until it answers."""
        command = [*self.user, self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder, "-h", ""]
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        ready = [self.programs / "pg_isready", "--quiet", "-h", self.folder]
        poll(lambda: subprocess.run(ready).returncode == 0, "PostgreSQL to answer")

    def kill(self):
        """End all its processes at once, as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def url(self, name):
        """Make an empty database and return its address."""
        self.run("createdb", "-h", self.folder, "-U", "postgres", name)
        return f"postgresql://postgres@/{name}?host={self.folder}"


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A running server of PostgreSQL."""
    folder = Path("/tmp" if os.getuid() == 0 else tmp_path_factory.getbasetemp()) / f"postgres-{os.getpid()}"
    folder.mkdir()
    server = Postgres(folder)
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
