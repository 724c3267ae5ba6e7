"""The SMS notebooks: executed whole in clones of the project, and checked by what they leave."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn
import yaml
from helpers import ROOT, printed, run_notebook
from sklearn.dummy import DummyClassifier
from sklearn.metrics import precision_score, recall_score

SPLITS = ("train", "validation", "test")


def subjects(git, folder):
    """Return the subject of each commit of a repository, latest first."""
    return git(folder, "log", "--format=%s").splitlines()


def set_parameter(folder, section, name, value):
    """Change one parameter in the params.yaml of a clone."""
    file = folder / "params.yaml"
    parameters = yaml.safe_load(file.read_text(encoding="utf-8"))
    parameters[section][name] = value
    file.write_text(yaml.safe_dump(parameters), encoding="utf-8")


@pytest.fixture(scope="module")
def registry(trained):
    """A client of the registry that train.ipynb filled."""
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{trained}/mlflow.db")


class TestPrepare:
    """prepare.ipynb in a fresh clone reproduces both versions and commits nothing."""

    def test_history_and_tree_are_as_before(self, prepared, git):
        assert "Data version" not in git(prepared, "reflog", "--format=%gs")
        assert git(prepared, "tag") == ""
        assert git(prepared, "status", "--porcelain", "--", "data", "dvc.lock") == ""

    def test_versions_are_commits_with_names(self, prepared, git):
        seeds = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["split"]["seeds"]
        for number, seed in enumerate(seeds, start=1):
            subject = git(prepared, "show", "--no-patch", "--format=%s", f":/^Data version {number}")
            assert subject == f"Data version {number}: split with seed {seed}"
            assert f"{subject}\n" in printed(prepared / "build/prepare.ipynb")

    def test_each_version_prints_its_distribution(self, prepared, git):
        expected = []
        versions = [git(prepared, "rev-parse", f":/^Data version {number}") for number in (1, 2)]
        for version in versions:
            for name in SPLITS:
                pointer = yaml.safe_load(git(prepared, "show", f"{version}:data/{name}.csv.dvc"))
                md5 = pointer["outs"][0]["md5"]
                labels = pd.read_csv(prepared / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}")["label"]
                expected.append((name, str((labels == 0).sum()), str((labels == 1).sum())))
        rows = re.findall(r"^(train|validation|test) +(\d+) +(\d+)", printed(prepared / "build/prepare.ipynb"), re.M)
        assert rows == expected
        assert git(prepared, "diff", "--name-only", *versions, "--", "data/*.csv.dvc").count("\n") == 2

    def test_profile(self, prepared):
        profile = json.loads((prepared / "build/profile.json").read_text(encoding="utf-8"))
        assert profile["messages"] == 5574
        assert "<html" in (prepared / "build/profile.html").read_text(encoding="utf-8").lower()


@pytest.mark.notebook
class TestAnotherVersion:
    """prepare.ipynb where a student changed a seed."""

    @pytest.fixture
    def changed(self, clone, tmp_path):
        """A clone with another second seed."""
        folder = clone(tmp_path / "clone")
        set_parameter(folder, "split", "seeds", [7, 43])
        return folder

    def test_is_committed_alone(self, changed, git, monkeypatch):
        for role in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{role}_NAME", "A Student")
            monkeypatch.setenv(f"GIT_{role}_EMAIL", "student@example.org")
        (changed / "README.md").write_text("staged")
        git(changed, "add", "README.md")
        before = subjects(git, changed)
        done, _ = run_notebook(changed / "prepare.ipynb", changed)
        assert done.returncode == 0, done.stderr[-3000:]
        assert subjects(git, changed) == ["Data version 2: split with seed 43", *before]
        committed = git(changed, "show", "--format=", "--name-only", "HEAD").split()
        assert committed == [f"data/{name}.csv.dvc" for name in ("test", "train", "validation")]
        assert git(changed, "status", "--porcelain") == "M  README.md\n M params.yaml"

    def test_is_not_committed_where_commit_is_off(self, changed, git):
        before = subjects(git, changed)
        done, executed = run_notebook(changed / "prepare.ipynb", changed, {"commit": False})
        assert done.returncode == 0, done.stderr[-3000:]
        assert subjects(git, changed) == before
        assert "Not committed, because commit is off." in printed(executed)
        assert not (changed / ".dvc/storage").exists()

    def test_without_an_identity_leaves_everything_as_it_was(self, changed, prepared, git):
        before = subjects(git, changed)
        git(changed, "config", "user.useConfigOnly", "true")
        names = [f"data/{name}.csv" for name in ("raw_data", *SPLITS, "repeated_splits")]
        for name in names:
            shutil.copy2(prepared / name, changed / name)
        pointers = [f"{name}.dvc" for name in names]
        subprocess.run(
            [sys.executable, "-m", "dvc", "commit", "--force", "--quiet", *pointers], cwd=changed, check=True
        )
        nobody = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "EMAIL": ""}
        done, _ = run_notebook(changed / "prepare.ipynb", changed, **nobody)
        assert done.returncode
        assert "git config user.name NAME" in done.stderr
        assert subjects(git, changed) == before
        assert git(changed, "status", "--porcelain") == "M params.yaml"
        for name in SPLITS:
            assert (changed / f"data/{name}.csv").read_bytes() == (prepared / f"data/{name}.csv").read_bytes()

    def test_broken_file_of_ones_own_leaves_the_data_as_it_was(self, changed, prepared, git):
        for name in SPLITS:
            shutil.copy2(prepared / f"data/{name}.csv", changed / f"data/{name}.csv")
        (changed / "mine.csv").write_text("label,text\nham,hello\nmaybe,hi\n", encoding="utf-8")
        set_parameter(changed, "data", "file", "mine.csv")
        done, _ = run_notebook(changed / "prepare.ipynb", changed)
        assert done.returncode
        assert "mine.csv, row 2, column 'label': 'maybe' is neither ham nor spam" in done.stderr
        assert git(changed, "status", "--porcelain") == "M params.yaml\n?? mine.csv"
        for name in SPLITS:
            assert (changed / f"data/{name}.csv").read_bytes() == (prepared / f"data/{name}.csv").read_bytes()

    def test_pointers_edited_by_hand_stop_it(self, changed):
        with (changed / "data/train.csv.dvc").open("a") as pointer:
            pointer.write("# mine\n")
        done, _ = run_notebook(changed / "prepare.ipynb", changed)
        assert done.returncode
        assert "data/train.csv.dvc has uncommitted changes" in done.stderr

    def test_no_git_clone_stops_it(self, changed):
        (changed / ".git").rename(changed / "not-git")
        done, _ = run_notebook(changed / "prepare.ipynb", changed)
        assert done.returncode
        assert "This folder is not a git clone" in done.stderr


class TestTrain:
    """train.ipynb, run on the data that prepare.ipynb left."""

    NAMES = ("sms-spam-rules", "sms-spam-naive-bayes", "sms-spam-tfidf-logistic")

    def test_equal_model_is_not_written_again(self, trained, git):
        assert git(trained, "status", "--porcelain", "--", "models") == ""
        assert "left as it is" in printed(trained / "build/train.ipynb")

    @pytest.mark.parametrize("name", NAMES)
    def test_registered_with_all_it_takes_to_make_it_again(self, trained, registry, name):
        version = registry.get_model_version(name, "1")
        run = registry.get_run(version.run_id).data
        for split in SPLITS:
            pointer = yaml.safe_load((trained / f"data/{split}.csv.dvc").read_text(encoding="utf-8"))
            assert 0.8 < run.metrics[f"{split}_aucpr"] <= 1
            assert run.params[f"md5 of {split}.csv"] == pointer["outs"][0]["md5"]
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", run.tags["code version"])
        assert run.params["seed"] == "42"
        files = {file.path for file in registry.list_artifacts(version.run_id)}
        assert {"Dockerfile", "precision_recall_validation.png"} <= files

    def test_champion_is_the_saved_model(self, trained, registry):
        card = json.loads((trained / "models/best_model.json").read_text(encoding="utf-8"))
        version = registry.get_model_version_by_alias(card["name"], "champion")
        metrics = registry.get_run(version.run_id).data.metrics
        assert metrics["validation_aucpr"] == pytest.approx(card["metrics"]["validation"]["aucpr"], abs=1e-4)

    def test_registry_gives_back_what_was_logged(self, trained):
        lines = re.findall(
            r"(\S+) +AUCPR on validation: (\S+) computed, (\S+) logged",
            printed(trained / "build/train.ipynb"),
        )
        assert [line[0] for line in lines] == list(self.NAMES)
        assert all(computed == logged for _, computed, logged in lines)

    def test_readme_has_the_figures_of_the_run(self, trained):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        for row in (trained / "build/benchmarks.md").read_text(encoding="utf-8").splitlines():
            figures = [cell.strip() for cell in row.split("|") if re.fullmatch(r" *\d\.\d+ *", cell)]
            assert not figures or re.search(".*".join(map(re.escape, figures)), readme), row
        assert (trained / "build/repeated.txt").read_text(encoding="utf-8").strip() in readme

    def test_mean_over_splits_reaches_the_bar(self, trained):
        summary = (trained / "build/repeated.txt").read_text(encoding="utf-8")
        assert float(re.search(r"splits: (\S+) ±", summary)[1]) >= 0.983


class TestFunctions:
    """What train.ipynb defines."""

    LABELS = np.array([0, 0, 0, 0, 1, 0, 1, 1, 1, 1])
    PROPENSITIES = np.array([0.0, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9])

    def test_aucpr_is_computed_on_propensities(self, train):
        assert train.evaluate(self.LABELS, self.PROPENSITIES)["aucpr"] == pytest.approx((4 + 5 / 6) / 5)

    def test_metrics_of_the_action(self, train):
        metrics = train.evaluate(self.LABELS, self.PROPENSITIES, 0.35)
        assert metrics["precision"] == pytest.approx(4 / 5)
        assert metrics["recall"] == pytest.approx(4 / 5)
        assert metrics["ham_blocked"] == pytest.approx(1 / 5)

    @pytest.mark.parametrize("least", [0.5, 0.8, 0.9, 1.0])
    def test_threshold_has_the_largest_recall_at_that_precision(self, train, least):
        random = np.random.default_rng(0)
        labels = random.integers(0, 2, 200)
        propensities = np.clip(labels * 0.3 + random.random(200) * 0.7, 0, 1)
        chosen = train.pick_threshold(labels, propensities, least) <= propensities
        reachable = [
            recall_score(labels, propensities >= at)
            for at in propensities
            if precision_score(labels, propensities >= at) >= least
        ]
        assert precision_score(labels, chosen) >= least
        assert recall_score(labels, chosen) == max(reachable)

    def test_precision_out_of_reach(self, train):
        with pytest.raises(ValueError, match="No threshold reaches"):
            train.pick_threshold(np.array([1, 0]), np.array([0.1, 0.9]), 0.9)

    def test_operating_points(self, train):
        points = pd.DataFrame(train.operating_points(self.LABELS, self.PROPENSITIES))
        assert points["threshold"].tolist() == [round(at / 100, 2) for at in range(101)]
        assert points["recall"].is_monotonic_decreasing
        assert points.iloc[0].tolist() == [0, 0.5, 1]
        assert points.iloc[-1]["recall"] == 0

    TABLE = pd.DataFrame(
        {"validation_aucpr": [0.9, 0.95, 0.99], "meets_load": [True, True, False]},
        index=["rules", "tfidf", "transformer"],
    )

    def test_best_of_those_that_carry_the_load_is_selected(self, train):
        assert train.select(self.TABLE) == "tfidf"
        assert train.select(self.TABLE, "tfidf") == "tfidf"
        assert train.select(self.TABLE, "rules") == "tfidf"
        with pytest.raises(RuntimeError, match="No model carries the load"):
            train.select(self.TABLE.assign(meets_load=False))

    def test_slow_machine_does_not_take_the_champion_down(self, train):
        slow = self.TABLE.assign(meets_load=[True, False, False])
        with pytest.raises(RuntimeError, match="tfidf, which is saved, is better than rules"):
            train.select(slow, "tfidf")
        assert train.select(slow, "tfidf", accept_lesser=True) == "rules"
        assert train.select(slow, "rules") == "rules"

    @pytest.fixture
    def saved(self, train, tmp_path):
        """A model, its card, the data and the path it was saved at."""
        data = pd.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, 1]})
        model = train.fit(DummyClassifier(strategy="prior"), data)
        versions = {"python": "3", "scikit-learn": sklearn.__version__}
        card = {"name": "dummy", "threshold": 0.5, "operating_points": [], "versions": versions}
        path = tmp_path / "models" / "model.joblib"
        assert train.save_model(model, card, path, data)
        return model, card, data, path

    def test_saved_model_comes_back(self, train, saved):
        model, card, data, path = saved
        loaded, loaded_card = train.load_model(path)
        assert np.array_equal(train.score(loaded, data), train.score(model, data))
        assert card.items() <= loaded_card.items()
        assert {file.name for file in Path(path.parent).iterdir()} == {"model.joblib", "model.json"}

    def test_equal_model_is_left_alone(self, train, saved):
        model, card, data, path = saved
        card["versions"]["python"] = "4"
        assert not train.save_model(model, card, path, data)

    def test_model_of_another_scikit_learn_is_written_again(self, train, saved):
        model, card, data, path = saved
        assert train.save_model(model, {**card, "versions": {"scikit-learn": "0.1"}}, path, data)

    def test_other_model_or_card_is_written(self, train, saved):
        model, card, data, path = saved
        assert train.save_model(model, {**card, "threshold": 0.4}, path, data)
        other = train.fit(DummyClassifier(strategy="prior"), data.assign(label=[0, 0, 1]))
        assert train.save_model(other, card, path, data)

    def test_model_that_is_not_its_cards_is_refused(self, train, saved):
        path = saved[-1]
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(ValueError, match="does not have the sha256 of its card"):
            train.load_model(path)

    def test_half_written_model_is_written_again(self, train, saved):
        model, card, data, path = saved
        path.write_bytes(path.read_bytes() + b"x")
        assert train.save_model(model, card, path, data)
        train.load_model(path)
        path.with_suffix(".json").write_text("")
        assert train.save_model(model, card, path, data)
        train.load_model(path)

    def test_data_that_differs_from_its_pointer_is_refused(self, trained):
        content = (trained / "data/test.csv").read_bytes()
        try:
            (trained / "data/test.csv").write_bytes(content + b"0,one more\n")
            done, _ = run_notebook(trained / "train.ipynb", trained)
        finally:
            (trained / "data/test.csv").write_bytes(content)
        assert done.returncode
        assert "is not the version that data/test.csv.dvc names" in done.stderr
