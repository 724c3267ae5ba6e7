"""monitoring.ipynb: its functions, and what it says when it is run."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import ROOT, printed, run_notebook
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

LIMITS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["monitoring"]


@pytest.fixture(scope="session")
def monitoring(definitions):
    """The functions of monitoring.ipynb."""
    return definitions("monitoring.ipynb")


@pytest.fixture
def random():
    """Chance, the same in each test."""
    return np.random.default_rng(1)


@pytest.fixture
def pool():
    """Messages of one source, ham and spam."""
    rows = pd.DataFrame({"characters": np.arange(300.0), "label": np.repeat([0.0, 1.0], [200, 100]), "wrong": 0.0})
    return {("today", 0): rows[:200], ("today", 1): rows[200:]}


class TestFunctions:
    """What monitoring.ipynb defines."""

    def test_samples_share_no_message(self, monitoring, pool, random):
        one, other = monitoring.draw_apart(pool, [("today", 100, 0.2), ("today", 80, 0.4)], random)
        assert (len(one), len(other)) == (100, 80)
        assert not set(one.index) & set(other.index)
        assert one.index.is_unique

    def test_samples_have_the_share_of_spam_that_was_asked_for(self, monitoring, pool, random):
        shares = [monitoring.draw_apart(pool, [("today", 100, 0.3)], random)[0]["label"].mean() for _ in range(200)]
        assert np.mean(shares) == pytest.approx(0.3, abs=0.01)
        assert np.std(shares) == pytest.approx(np.sqrt(0.3 * 0.7 / 100), rel=0.2)  # left to chance

    def test_nobody_is_judged_by_a_model_that_read_him(self, monitoring):
        texts = [f"word{number // 4} spam" if number % 2 else f"word{number // 4} ham" for number in range(80)]
        data = pd.DataFrame({"text": texts, "label": [0, 1] * 40, "group": np.arange(80) // 4, "source": "today"})
        model = Pipeline(
            [("features", TfidfVectorizer(token_pattern=r"word\d+")), ("classifier", LogisticRegression())]
        )
        log_odds = monitoring.judge_unseen(model, data, np.ones(80))
        assert np.ptp(log_odds) == pytest.approx(0)  # their words stand in no message that was read

    def test_calibration(self, monitoring, random):
        labels = random.random(4000) < 0.1
        data = pd.DataFrame({"text": "", "label": labels.astype(int), "source": "today"})
        platt = monitoring.calibrate(random.normal(np.where(labels, 4.0, -4.0), np.sqrt(8)), data)
        propensities = monitoring.calibrated(platt, np.array([-2.0, 0.0, 2.0]))
        assert propensities == pytest.approx([0.12, 0.5, 0.88], abs=0.05)  # at even odds, though one in ten is spam

    def test_meaning_changes_and_what_is_seen_does_not(self, monitoring, pool, random):
        before = pd.concat(pool.values())
        after = monitoring.change_meaning(before, random, flipped=0.3)
        assert after["wrong"].mean() == pytest.approx(0.3, abs=0.08)
        assert ((after["label"] != before["label"]) == (after["wrong"] != before["wrong"])).all()
        assert after["characters"].equals(before["characters"])

    def test_more_than_there_is_cannot_be_drawn(self, monitoring, pool, random):
        with pytest.raises(ValueError, match="there are too few messages to draw that many"):
            monitoring.draw_apart(pool, [("today", 200, 0.2), ("today", 200, 0.2)], random)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("alpha", 5, "alpha must be a share between 0 and 1, not 5."),
            ("least", None, "least must be a share between 0 and 1, not None."),
            ("windows", 0, "windows must be a whole number of at least 1, not 0."),
            ("window", 99.5, "window must be a whole number of at least 1, not 99.5."),
            ("labels", 2000, "labels must not be more than window"),
            ("mix", {"today ham": 0.8}, "the shares of the mix must add up to 1."),
        ],
    )
    def test_nonsense_is_told_in_a_sentence(self, monitoring, name, value, message):
        monitoring.check_limits(LIMITS)
        with pytest.raises(ValueError, match=re.escape(message)):
            monitoring.check_limits({**LIMITS, name: value})

    def test_interval(self, monitoring):
        assert monitoring.interval(0, 200) == "0.0% (0.0% to 1.9%)"


@pytest.fixture(scope="module")
def report(prepared):
    """What monitoring.ipynb prints in a clone with the data."""
    done, executed = run_notebook(ROOT / "monitoring.ipynb", prepared)
    assert done.returncode == 0, done.stderr[-3000:]
    return printed(executed)


def check_bars(report):
    """Check what was promised of false alarms and power."""
    assert float(re.search(r"false alarms at most ([\d.]+)%", report)[1]) <= 2
    powers = [int(power) for power in re.findall(r": power (\d+)% by", report)]
    assert len(powers) == 6
    assert min(powers) >= 90


def test_committed_run_reaches_the_bars():
    check_bars(printed(ROOT / "monitoring.ipynb"))


def test_each_detector_was_measured_often_enough():
    assert LIMITS["windows"] >= 200
    assert LIMITS["window"] == 1000
    assert LIMITS["labels"] == 200
    assert f"share of {LIMITS['windows']} windows" in printed(ROOT / "monitoring.ipynb")


def test_every_plot_is_read():
    cells = json.loads((ROOT / "monitoring.ipynb").read_text(encoding="utf-8"))["cells"]
    plots = [number for number, cell in enumerate(cells) if "plt.subplots" in "".join(cell["source"])]
    assert len(plots) >= 5
    for number in plots:
        assert any("image/png" in output.get("data", {}) for output in cells[number]["outputs"])
        assert any("**Reading**" in "".join(cell["source"]) for cell in cells[number + 1 : number + 5])


@pytest.mark.operations
@pytest.mark.notebook
class TestReport:
    """Run anew, it says the same."""

    def test_bars(self, report):
        check_bars(report)

    def test_what_is_invisible_without_labels(self, report):
        for situation in ("one message in five means the other thing", "the isles are served badly"):
            row = re.search(rf"^{situation} +(.*)$", report, re.M)[1]
            assert float(re.findall(r"([\d.]+)% \(", row)[3]) <= 5  # any of these

    def test_a_reference_that_is_no_sample_cries_wolf(self, report):
        rates = dict(re.findall(r"^(reference and window|a reference)[^%\n]*? ([\d.]+)% \(", report, re.M))
        assert float(rates["reference and window"]) < 9
        assert float(rates["a reference"]) > 20

    def test_streams(self, report):
        rows = re.findall(r"^(nothing, by \w+) +([\d.]+)% \([^)]*\) +([\d.]+)%", report, re.M)
        assert len(rows) == 2
        for _, early, late in rows:
            assert float(early) + float(late) <= 2
        labels = re.search(r"^20% mean the other thing .*?\) +[\d.]+% \(.*?\) +([\d,]+)", report, re.M)[1]
        assert int(labels) <= 200
