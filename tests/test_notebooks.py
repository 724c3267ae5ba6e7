"""The SMS notebooks: executed whole in clones of the project, and checked by what they leave."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn
import yaml
from helpers import ROOT, printed, run_notebook
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_score, recall_score
from sklearn.pipeline import Pipeline

from score import load_model

SPLITS = ("train", "validation", "test")
SOURCES = ("collection", "today")


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

    VERSIONS = ("1: split with seed 7", "2: split with seed 42", "3: with messages of today")

    def test_versions_are_commits_with_names(self, prepared, git):
        for number, version in enumerate(self.VERSIONS, start=1):
            subject = git(prepared, "show", "--no-patch", "--format=%s", f":/^Data version {number}")
            assert subject == f"Data version {version}"
            assert f"{subject}\n" in printed(prepared / "build/prepare.ipynb")

    def test_each_version_prints_its_distribution(self, prepared, git):
        expected = []
        versions = [git(prepared, "rev-parse", f":/^Data version {number}") for number in (1, 2, 3)]
        for version in versions:
            for name in SPLITS:
                pointer = yaml.safe_load(git(prepared, "show", f"{version}:data/{name}.csv.dvc"))
                md5 = pointer["outs"][0]["md5"]
                labels = pd.read_csv(prepared / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}")["label"]
                expected.append((name, str((labels == 0).sum()), str((labels == 1).sum())))
        rows = re.findall(r"^(train|validation|test) +(\d+) +(\d+)", printed(prepared / "build/prepare.ipynb"), re.M)
        assert rows == expected
        for one, other in pairwise(versions):
            assert git(prepared, "diff", "--name-only", one, other, "--", "data/*.csv.dvc").count("\n") == 2

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
        made = ["Data version 3: with messages of today", "Data version 2: split with seed 43"]
        assert subjects(git, changed) == [*made, *before]
        for commit in ("HEAD", "HEAD~1"):
            committed = git(changed, "show", "--format=", "--name-only", commit).split()
            assert committed == [f"data/{name}.csv.dvc" for name in ("test", "train", "validation")]
        assert git(changed, "status", "--porcelain") == "M  README.md\n M params.yaml"

    def test_is_not_committed_where_commit_is_off(self, changed, git):
        before = subjects(git, changed)
        done, executed = run_notebook(changed / "prepare.ipynb", changed, {"commit": False})
        assert done.returncode == 0, done.stderr[-3000:]
        assert subjects(git, changed) == before
        assert "Not committed, because commit is off." in printed(executed)
        assert set(pd.read_csv(changed / "data/train.csv")["source"]) == set(SOURCES)  # the third version stays
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

    NAMES = ("sms-spam-rules", "sms-spam-naive-bayes", "sms-spam-tfidf", "sms-spam-tfidf-tuned")

    def test_equal_model_is_not_written_again(self, trained, git):
        assert git(trained, "status", "--porcelain", "--", "models") == ""
        assert "left as it is" in printed(trained / "build/train.ipynb")

    @pytest.mark.parametrize("name", NAMES)
    def test_registered_with_all_it_takes_to_make_it_again(self, trained, registry, name):
        version = registry.get_model_version(name, "1")
        run = registry.get_run(version.run_id).data
        for split in SPLITS:
            pointer = yaml.safe_load((trained / f"data/{split}.csv.dvc").read_text(encoding="utf-8"))
            assert run.params[f"md5 of {split}.csv"] == pointer["outs"][0]["md5"]
            assert 0.8 < run.metrics[f"{split}_aucpr_collection"] <= 1
            assert 0.4 < run.metrics[f"{split}_aucpr_today"] <= 1
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", run.tags["code version"])
        assert run.params["seed"] == "42"
        files = {file.path for file in registry.list_artifacts(version.run_id)}
        assert {"Dockerfile", "precision_recall_validation.png"} <= files

    def test_champion_is_the_saved_model(self, trained, registry):
        card = json.loads((trained / "models/best_model.json").read_text(encoding="utf-8"))
        version = registry.get_model_version_by_alias(card["name"], "champion")
        metrics = registry.get_run(version.run_id).data.metrics
        for source in SOURCES:
            assert metrics[f"test_aucpr_{source}"] == pytest.approx(card["metrics"]["test"][source]["aucpr"], abs=1e-4)

    def test_card_acts_by_cost(self, trained):
        card = json.loads((trained / "models/best_model.json").read_text(encoding="utf-8"))
        assert card["threshold"] == card["thresholds"]["cost"] == pytest.approx(10 / 11, abs=1e-6)
        assert card["thresholds"]["used"] == "cost"
        assert 0.3 < card["thresholds"]["precision"] < card["thresholds"]["cost"]
        assert (trained / "models/best_model.joblib").stat().st_size < 1.5e6

    def test_saved_model_is_calibrated(self, trained):
        """Of the test messages with a propensity of 0.2 to 0.8, about as many are spam as those add up to."""
        test = pd.read_csv(trained / "data/test.csv", keep_default_na=False)
        today = test[test["source"] == "today"]
        propensities = load_model(trained / "models/best_model.joblib").predict_proba(today["text"])[:, 1]
        middle = (propensities > 0.2) & (propensities < 0.8)
        assert propensities[middle].mean() == pytest.approx(today["label"][middle].mean(), abs=0.12)

    def test_registry_gives_back_what_was_logged(self, trained):
        lines = re.findall(
            r"(\S+) +(\S+) +AUCPR on validation: (\S+) computed, (\S+) logged", printed(trained / "build/train.ipynb")
        )
        assert [line[:2] for line in lines] == [(name, source) for name in self.NAMES for source in SOURCES]
        assert all(computed == logged for *_, computed, logged in lines)

    @pytest.mark.parametrize("table", ["benchmarks.md", "test.md", "repeated.txt"])
    def test_readme_has_the_figures_of_the_run(self, trained, table):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        for row in (trained / "build" / table).read_text(encoding="utf-8").splitlines():
            for figure in re.findall(r"(?<![\d,])\d\.\d{3}(?!\d)|\d+\.\d+%", row):
                assert figure in readme, f"{figure} of {row}"

    def test_honest_figures_reach_the_bars(self, trained):
        summary = (trained / "build/repeated.txt").read_text(encoding="utf-8")
        line = next(line for line in summary.splitlines() if "collection" in line)
        mean, lowest = (float(re.search(rf"{what} ([\d.]+)", line)[1]) for what in ("collection:", "lowest"))
        cost, other_cost = (int(re.search(rf"{what} (\d+)", line)[1]) for what in ("cost", "0.90 rule:"))
        assert mean >= 0.975
        assert lowest >= 0.955
        assert cost <= 25
        assert 3 * cost <= other_cost


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
        assert metrics["cost"] == pytest.approx(1000 * (10 * 1 + 1 * 1) / 10)

    def test_no_figure_mixes_the_sources(self, train):
        data = pd.DataFrame({"label": self.LABELS, "source": ["collection", "today"] * 5})
        table = train.by_source(data, self.PROPENSITIES, 0.35)
        for source, rows in data.groupby("source"):
            alone = train.evaluate(rows["label"].to_numpy(), self.PROPENSITIES[rows.index], 0.35)
            assert table.loc[source].to_dict() == pytest.approx(alone)

    def test_weights_make_classes_and_sources_alike(self, train):
        data = pd.DataFrame({"label": [0, 0, 0, 1, 0, 1, 1], "source": ["a"] * 4 + ["b"] * 3, "text": "x"})
        weights = pd.Series(train.balance(data))
        sums = weights.groupby([data["source"], data["label"]]).sum()
        assert sums.to_list() == pytest.approx([7 / 4] * 4)

    def test_today_weighs_as_asked(self, train):
        class Recorder(BaseEstimator):
            def fit(self, texts, labels, sample_weight):
                self.weights_ = sample_weight
                return self

        data = pd.DataFrame({"text": ["a", "b"], "label": [0, 1], "source": ["collection", "today"]})
        model = train.fit(Pipeline([("classifier", Recorder())]), data, 0.2)
        assert model[-1].weights_.tolist() == [1, 0.2]

    def test_out_of_fold_never_sees_its_own_group(self, train):
        class Memory(BaseEstimator):
            def fit(self, texts, labels, sample_weight):
                self.groups_ = set(texts)
                return self

            def predict_proba(self, texts):
                return np.array([[0.5, 0.5] if text not in self.groups_ else [0, 1] for text in texts])

        groups = [str(i // 2) for i in range(20)]
        data = pd.DataFrame({"text": groups, "label": [0, 1] * 10, "source": "today", "group": groups})
        train.out_of_fold.__globals__["SEED"] = 42
        log_odds = train.out_of_fold(Pipeline([("classifier", Memory())]), data, 1.0, jobs=1)
        assert log_odds == pytest.approx(np.zeros(20))

    def test_calibration_is_absorbed_into_the_weights(self, train):
        texts, labels = ["win a prize now", "see you at home", "claim your prize", "home at eight"], [1, 0, 1, 0]
        data = pd.DataFrame({"text": texts, "label": labels, "source": "today"})
        model = train.fit(train.pipeline(TfidfVectorizer(), LogisticRegression()), data)
        absorbed = train.absorb(model, (1.7, -0.4))
        assert train.score(absorbed, data) == pytest.approx(train.calibrated_score(model, data, (1.7, -0.4)))
        assert not np.allclose(train.score(model, data), train.score(absorbed, data))

    @pytest.mark.parametrize(
        ("count", "total", "expected"), [(5, 1000, "met"), (200, 1000, "not met"), (5, 100, "cannot tell")]
    )
    def test_verdict(self, train, count, total, expected):
        draws = train.draw_share(count, total, np.random.default_rng(0))
        assert np.mean(draws) == pytest.approx((count + 0.5) / (total + 1), rel=0.05)
        assert train.verdict(draws, 0.05, total)["verdict"].startswith(expected)

    def test_bootstrap_covers_the_mean(self, train):
        values = np.random.default_rng(0).normal(3, 1, 400)
        low, high = train.bootstrap(lambda at: values[at].mean(), np.arange(400))
        assert low < values.mean() < high
        assert high - low == pytest.approx(4 * 1 / 20, rel=0.2)

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
        data = pd.DataFrame({"label": self.LABELS, "source": "today"})
        points = train.operating_points(data, self.PROPENSITIES)
        assert [point["threshold"] for point in points] == [round(at / 100, 2) for at in range(101)]
        assert points[0]["today"] == {"recall": 1, "ham_blocked": 1}
        assert points[35]["today"] == {"recall": 0.8, "ham_blocked": 0.2}
        assert points[-1]["today"] == {"recall": 0, "ham_blocked": 0}

    TABLE = pd.DataFrame(
        {
            "validation_aucpr_collection": [0.95, 0.99, 0.99],
            "validation_aucpr_today": [0.5, 0.95, 0.99],
            "meets_load": [True, True, False],
        },
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

    def test_what_is_lost_on_the_collection_is_bounded(self, train):
        table = self.TABLE.assign(meets_load=True, validation_aucpr_collection=[0.99, 0.986, 0.97])
        assert train.select(table) == "tfidf"

    @pytest.fixture
    def saved(self, train, tmp_path):
        """A model, its card, the data and the path it was saved at."""
        data = pd.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, 1], "source": "today"})
        model = train.fit(Pipeline([("classifier", DummyClassifier(strategy="prior"))]), data)
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
        other = train.fit(Pipeline([("classifier", DummyClassifier(strategy="prior"))]), data.assign(label=[0, 0, 1]))
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
