"""What the linters do not see: imports of single files and notebooks, the lock, executed notebooks."""

import ast
import hashlib
import re
import statistics

import pytest
from helpers import ROOT, code_cells

NOTEBOOKS = ("prepare.ipynb", "train.ipynb", "impact.ipynb", "monitoring.ipynb", "transfer_learning.ipynb")
MAY_IMPORT = {
    "score.py": {"engine"},
    "app.py": {"engine", "score"},
    **{name: {"engine", "score"} for name in NOTEBOOKS},
}


def imported(source: str) -> set[str]:
    """Return the top-level names of the modules that a program imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_one_way(name):
    path = ROOT / name
    sources = [path.read_text(encoding="utf-8")]
    if path.suffix == ".ipynb":
        sources = ["".join(cell["source"]) for cell in code_cells(path)]
        sources = [re.sub("(?m)^( *)[%!].*", r"\1pass", source) for source in sources]  # commands of Jupyter
    own = {"app", "score", "engine", "operations", "benchmarks", "test", "helpers"}
    assert set().union(*map(imported, sources)) & own <= MAY_IMPORT[name]


def test_lock_is_of_the_requirements_as_they_are():
    made_from = re.search("[0-9a-f]{64}", (ROOT / "requirements.lock").read_text(encoding="utf-8"))[0]
    files = re.search("REQUIREMENTS := (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()
    content = b"".join((ROOT / file).read_bytes() for file in files)
    assert hashlib.sha256(content).hexdigest() == made_from, "run make lock"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook_was_executed_and_is_clean(name):
    cells = code_cells(ROOT / name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"]
        if "private-output" in cell["metadata"].get("tags", []):
            assert not cell["outputs"]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"\w+Warning:|/root/|/home/|/tmp/", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_short(name):
    lengths = [len("".join(cell["source"]).splitlines()) for cell in code_cells(ROOT / name)]
    assert max(lengths) <= 30
    assert statistics.median(lengths) <= 10
