"""What the test modules share: the functions of the notebooks, and clones of the project to run them in."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
from helpers import BUCKET, ROOT, code_cells, missing, run_notebook

ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "student",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


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


@pytest.fixture
def bucket(monkeypatch):
    """The address of an S3-compatible server with an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    yield endpoint
    server.stop()


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        missing("no Chromium on this machine: apt-get install chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()
