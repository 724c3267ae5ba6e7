"""`make profile`: benchmarks/profiles.py."""

import json
import statistics

import pytest

from benchmarks import profiles


def test_time_goes_to_the_packages_whose_code_runs(tmp_path, monkeypatch):
    def work():
        # One long call: on a busy machine, little of a short one is over before the first sample.
        statistics.variance(range(500_000))

    monkeypatch.setattr(profiles, "STEPS", {"work": work})
    profiles.sample("work", tmp_path / "time.html")
    figures = json.loads((tmp_path / "time.json").read_text())
    assert sum(figures["shares"].values()) == pytest.approx(figures["seconds"], rel=0.2)
    assert max(figures["shares"], key=figures["shares"].get) == "Python"
    assert "<html" in (tmp_path / "time.html").read_text().lower()
    profiles.trace("work", tmp_path / "memory.bin")
    assert (tmp_path / "memory.bin").stat().st_size > 0


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/.venv/lib/python3.11/site-packages/sklearn/base.py", "sklearn"),
        ("/usr/lib/python3.11/json/decoder.py", "Python"),
        ("<frozen importlib._bootstrap>", "Python"),
        ("/x/clone/score.py", "this project"),
        ("/tmp/ipykernel_1/2.py", "the notebook"),
        ("<ipython-input-1>", "the notebook"),
    ],
)
def test_files_belong_to_packages(path, name):
    assert profiles.package(path) == name
