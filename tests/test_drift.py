"""The detectors of drift (engine/drift.py, expected.py and adwin.py), on numbers of which the truth is known."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import ROOT
from scipy.stats import chi2_contingency
from statsmodels.stats.multitest import multipletests

from engine.adwin import DriftStream
from engine.drift import compare, holm, mix, segment_gaps, summarise, text_features, watched
from engine.expected import estimate_spam_share, expected_precision
from score import load_card


@pytest.fixture
def random():
    """Chance, the same in each test."""
    return np.random.default_rng(1)


def draw(random, size, shift=0.0):
    """Return messages as columns: one that is continuous, one that counts, one that is true or false."""
    return pd.DataFrame(
        {
            "propensity": np.clip(random.beta(1, 3, size) + shift, 0, 1),
            "digits": random.poisson(2, size),
            "prediction": random.random(size) < 0.2,
        }
    )


class TestColumns:
    """What is counted in a message."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", (0, 0, 0, 0, 0, 0)),
            ("Call 09061 NOW", (14, 3, 5, 4, 0, 0)),
            ("\u00a35 at evri-fee.example, see www.x.co", (36, 5, 1, 0, 1, 2)),
            ("ok see you.. at home. bye", (25, 6, 0, 0, 0, 0)),
            ("https://a.example/b.html", (24, 1, 0, 0, 0, 1)),
        ],
    )
    def test_counts(self, text, expected):
        assert tuple(text_features([text]).iloc[0]) == expected

    def test_columns_of_messages(self):
        data = watched(["a", "b", "c"], np.array([0.1, 0.9, 0.95]), 0.9, np.array([0, 0, 1]))
        assert data["prediction"].tolist() == [False, True, True]
        assert data["wrong"].tolist() == [False, True, False]
        assert "wrong" not in watched(["a"], np.array([0.1]), 0.9)


class TestCompare:
    """A window against a reference."""

    def test_by_hand(self):
        reference = {
            "edges": {"digits": [0.0, 2.0]},
            "messages": {"": 100},
            "counts": {"": {"digits": [50, 30, 20, 0]}},
        }
        window = pd.DataFrame({"digits": [0] * 10 + [1] * 5 + [2] * 5 + [3] * 20})
        row = compare(reference, window, 0.01, 0.05).loc["digits"]
        assert row["p"] == pytest.approx(chi2_contingency([[50, 30, 20], [10, 10, 20]]).pvalue)
        assert row["distance"] == pytest.approx(0.3)
        assert (row["bin"], row["before"], row["now"]) == ("above 2", 0.2, 0.5)
        assert row["alarm"]

    def test_nothing_changed_gives_few_alarms(self, random):
        alarms = [
            compare(summarise(draw(random, 2000)), draw(random, 1000), 0.05, 0)["alarm"].any() for _ in range(300)
        ]
        assert 0.02 <= np.mean(alarms) <= 0.08

    def test_a_change_is_found_where_it_is(self, random):
        table = compare(summarise(draw(random, 2000)), draw(random, 1000, 0.2), 0.01, 0.05)
        assert table.index[table["alarm"]].tolist() == ["propensity"]
        assert table.index[0] == "propensity"

    def test_a_small_difference_is_no_alarm_however_sure(self, random):
        before, now = draw(random, 200_000), draw(random, 200_000)
        now["prediction"] = random.random(len(now)) < 0.22
        row = compare(summarise(before), now, 0.01, 0.05).loc["prediction"]
        assert row["corrected"] < 1e-9
        assert not row["alarm"]
        assert compare(summarise(before), now, 0.01, 0.01).loc["prediction", "alarm"]

    def test_whatever_columns_are_there(self, random):
        reference = summarise(draw(random, 1000))
        table = compare(reference, draw(random, 500)[["prediction"]].assign(region="north"), 0.01, 0.05)
        assert table.index.tolist() == ["prediction"]
        for nothing in (pd.DataFrame({"other": [1]}), draw(random, 500).iloc[:0]):
            with pytest.raises(ValueError, match="there is nothing to compare"):
                compare(reference, nothing, 0.01, 0.05)

    def test_missing_values_are_seen(self, random):
        before, now = draw(random, 1000), draw(random, 500)
        now["digits"] = now["digits"].astype("Int64").mask(now.index % 3 == 0)
        row = compare(summarise(before), now, 0.01, 0.05).loc["digits"]
        assert (row["bin"], row["alarm"]) == ("missing", True)
        assert summarise(before.assign(digits=np.nan))["edges"]["digits"] == []

    def test_a_constant_column_that_changes_is_seen(self, random):
        before = draw(random, 1000).assign(digits=0)
        same = compare(summarise(before), draw(random, 500).assign(digits=0), 0.01, 0.05)
        assert not same["alarm"].any()
        row = compare(summarise(before), draw(random, 500).assign(digits=1), 0.01, 0.05).loc["digits"]
        assert (row["bin"], row["alarm"]) == ("up to 0", True)

    def test_bins_are_neither_empty_nor_many(self, random):
        rare = np.repeat([0, 1, 2], [2500, 2475, 25])
        for values in (random.random(5000), random.poisson(0.02, 5000), random.poisson(3, 5000), rare):
            counts = summarise(pd.DataFrame({"x": values}))["counts"][""]["x"]
            assert 1 <= len(counts) - 1 <= 10
            assert counts[-1] == 0
            assert sum(counts) == 5000
            assert min(counts[:-1]) >= 0.01 * 5000

    def test_holm(self, random):
        for size in (1, 2, 9):
            p = random.random(size) ** 3
            np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


class TestReference:
    """It travels in a card, and is mixed as an operator has it."""

    def test_survives_json(self, random):
        data = draw(random, 1000)
        reference = summarise(data, np.where(data["prediction"], "spam", "ham"))
        again = json.loads(json.dumps(reference))
        assert again == reference
        window = draw(random, 500)
        pd.testing.assert_frame_equal(compare(again, window, 0.01, 0), compare(reference, window, 0.01, 0))

    def test_mixed_as_asked(self, random):
        data = draw(random, 4000)
        data["prediction"] = np.arange(4000) < 2000
        reference = summarise(data, np.where(data["prediction"], "spam", "ham"))
        mixed = mix(reference, {"ham": 0.8, "spam": 0.2})
        assert mixed["messages"] == pytest.approx({"ham": 2000, "spam": 500})
        window = draw(random, 1000).assign(prediction=np.arange(1000) < 200)
        row = compare(mixed, window, 0.01, 0.05).loc["prediction"]
        assert row["distance"] == pytest.approx(0, abs=1e-9)
        assert compare(reference, window, 0.01, 0.05).loc["prediction", "alarm"]

    def test_a_group_that_is_not_asked_for_is_left_out(self, random):
        data = draw(random, 300)
        reference = summarise(data, ["old"] * 100 + ["ham"] * 100 + ["spam"] * 100)
        assert set(mix(reference, {"ham": 0.5, "spam": 0.5})["counts"]) == {"ham", "spam"}
        with pytest.raises(KeyError, match="unheard"):
            mix(reference, {"unheard": 1.0})


class TestCard:
    """What train.ipynb writes into the card of a model."""

    GROUPS = ("collection ham", "collection spam", "today ham", "today spam")

    def test_made_of_ham_and_spam_of_each_source(self, train):
        data = pd.DataFrame(
            {"text": ["a", "b 1", "c", "d"], "label": [0, 1, 1, 0], "source": ["old", "old", "new", "new"]}
        )
        reference = train.reference(data, np.array([0.1, 0.95, 0.2, 0.3]), 0.9)
        assert reference["messages"] == {"new ham": 1, "new spam": 1, "old ham": 1, "old spam": 1}
        assert set(reference["edges"]) == {*text_features([]), "propensity", "prediction", "wrong"}
        assert sum(reference["counts"]["new spam"]["wrong"]) == 1

    def test_saved_one_is_whole_and_small(self):
        card = load_card()
        reference = card["reference"]
        assert tuple(reference["messages"]) == self.GROUPS
        for group, columns in reference["counts"].items():
            for name, counts in columns.items():
                assert sum(counts) == reference["messages"][group]
                assert len(counts) == len(reference["edges"][name]) + 2
        assert len(json.dumps(card, indent=2)) < 40_000

    def test_saved_one_is_of_the_saved_model(self):
        card = load_card()
        (point,) = (point for point in card["operating_points"] if point["threshold"] == 0.91)
        for source in ("collection", "today"):
            counts = card["reference"]["counts"][f"{source} spam"]["prediction"]
            assert counts[1] / sum(counts) == pytest.approx(point[source]["recall"], abs=0.005)

    def test_mixed_as_the_operator_has_it(self):
        limits = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["monitoring"]
        mixed = mix(load_card()["reference"], limits["mix"])
        spam = mixed["messages"]["today spam"] / sum(mixed["messages"].values())
        assert spam == pytest.approx(limits["mix"]["today spam"])
        window = watched(["ok see you at 8"] * 50, np.full(50, 0.01), 0.9)
        assert compare(mixed, window, limits["alpha"], limits["least"]).loc["characters", "alarm"]


class TestExpected:
    """What calibrated propensities tell without labels."""

    @pytest.mark.parametrize("share", [0.02, 0.2, 0.7])
    def test_share_and_precision_are_found(self, random, share):
        labels = random.random(50_000) < share
        log_odds = random.normal(np.where(labels, 1.5, -1.5), np.sqrt(3))  # calibrated at even odds
        propensities = 1 / (1 + np.exp(-log_odds))
        found = estimate_spam_share(propensities)
        assert found == pytest.approx(share, abs=0.015)
        precision = labels[propensities >= 0.9].mean()
        assert expected_precision(propensities, 0.9, found) == pytest.approx(precision, abs=0.03)

    def test_ends(self):
        assert estimate_spam_share(np.full(100, 0.01)) == 0
        assert estimate_spam_share(np.ones(100)) == 1
        assert np.isnan(expected_precision(np.array([0.1, 0.2]), 0.9, 0.2))
        assert expected_precision(np.array([1.0]), 0.9, 1.0) == 1


class TestSegments:
    """Who is served worse than others."""

    def test_the_one_that_is_served_badly_is_found(self, random):
        segments = np.repeat(["north", "coast", "south", "isles"], 200)
        wrong = random.random(800) < np.where(segments == "isles", 0.3, 0.1)
        table = segment_gaps(wrong, segments, 0.01)
        assert table.index[table["alarm"]].tolist() == ["isles"]
        row = table.loc["isles"]
        assert row["messages"] == 200
        assert row["low"] < 0.2 < row["high"]
        assert row["gap"] == pytest.approx(wrong[600:].mean() - wrong[:600].mean())

    def test_a_segment_that_is_served_well_is_no_alarm(self, random):
        segments = np.repeat(["north", "coast", "south", "isles"], 300)
        wrong = random.random(1200) < np.where(segments == "isles", 0.02, 0.4)
        table = segment_gaps(wrong, segments, 0.01)
        assert table.loc["isles", "corrected"] < 0.01
        assert not table.loc["isles", "alarm"]

    def test_few_false_alarms(self, random):
        segments = np.repeat(list("abcd"), 50)
        alarms = [segment_gaps(random.random(200) < 0.3, segments, 0.05)["alarm"].any() for _ in range(200)]
        assert np.mean(alarms) <= 0.06

    def test_nobody_to_compare_with(self):
        assert segment_gaps([True, False], ["north", "north"], 0.01).empty


@pytest.mark.operations
class TestStream:
    """ADWIN, and its state from night to night."""

    def test_a_change_is_noticed_and_begins_anew(self, random):
        values = np.concatenate([random.random(1000) < 0.1, random.random(1000) < 0.4]).astype(float)
        stream = DriftStream(0.002, 10_000)
        alarms = stream.update(values)
        assert len(alarms) == 1
        assert 1000 < alarms[0] < 1400
        assert list(stream.state) == values[alarms[0] + 1 :].tolist()

    def test_no_change_no_alarm(self, random):
        assert not any(DriftStream(0.002, 10_000).update(random.random(3000)) for _ in range(20))

    @pytest.mark.parametrize("nights", [2, 7])
    def test_interrupted_goes_on_as_if_it_had_not_been(self, random, nights):
        values = np.concatenate([random.random(900) < 0.1, random.random(600) < 0.3, random.random(700) < 0.1])
        whole, state, alarms, read = DriftStream(0.002, 10_000), [], [], 0
        for night in np.array_split(values.astype(float), nights):
            stream = DriftStream(0.002, 10_000, json.loads(json.dumps(state)))
            alarms += [read + at for at in stream.update(night)]
            state, read = list(stream.state), read + len(night)
        assert alarms == whole.update(values.astype(float))
        assert len(alarms) == 2
        assert state == list(whole.state)

    def test_memory_is_bounded(self, random):
        stream = DriftStream(0.002, 500)
        values = random.random(2000)
        stream.update(values)
        assert list(stream.state) == values[-500:].tolist()
