"""What the test modules share: the functions of the notebooks, and clones of the project to run them in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def code_cells(path):
    """Return the code cells of a notebook as dicts."""
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(path):
    """Return what the cells of an executed notebook printed or displayed as text."""
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join("".join(text) for text in texts)


@pytest.fixture(scope="session")
def definitions():
    """A function that returns what the cells tagged "definitions" of a notebook define."""

    def define(name):
        namespace = {"__name__": name}
        for cell in code_cells(PROJECT / name):
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
def run_notebook():
    """A function that executes a notebook of a folder there, and returns the finished process."""

    # What runs in a clone is not what is measured here.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}

    def run(folder, name, **environment):
        build = folder / "build"
        build.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "papermill", "--no-progress-bar", name, str(build / name)],
            cwd=folder,
            env={**outside, **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def git():
    """A function that runs git in a folder as somebody and returns what it prints."""

    def call(folder, *arguments):
        identity = ["-c", "user.name=A Student", "-c", "user.email=student@example.org"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    return call


@pytest.fixture(scope="session")
def clone(git):
    """A function that clones the project to a folder, with the uncommitted changes of its work tree."""

    def make(folder):
        git(PROJECT, "clone", "--quiet", str(PROJECT), str(folder))
        changed = git(PROJECT, "ls-files", "--modified", "--others", "--exclude-standard", "-z").split("\0")
        for name in filter(None, changed):
            if (PROJECT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / name, folder / name)
        if git(folder, "status", "--porcelain"):
            git(folder, "add", "--all")
            git(folder, "commit", "--quiet", "--no-verify", "--message", "As it is in the work tree")
        return folder

    return make
