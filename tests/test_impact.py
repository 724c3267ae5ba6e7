"""impact.ipynb: its functions, and what it says when it is run."""

import copy
import math
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import ROOT, printed, run_notebook
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

IMPACT = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["impact"]


@pytest.fixture(scope="session")
def impact(definitions):
    """The functions of impact.ipynb."""
    return definitions("impact.ipynb")


@pytest.fixture
def random():
    """Chance, the same in each test."""
    return np.random.default_rng(1)


class TestFigures:
    """The operator's figures are checked before anything is made of them."""

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("engagement",), [0.3, 0.1, 1.0], "engagement must be three numbers, 0 <= low <= likely <= high"),
            (("churn",), [-0.1, 0.1, 1.0], "churn must be three numbers"),
            (("churn",), [0.1, math.nan, 1.0], "churn must be three numbers"),
            (("complaint",), 0.01, "complaint must be three numbers"),
            (("complaint",), [0.1, 0.2, 1.5], "complaint is a share: none of its numbers may be above 1"),
            (("price",), 0, "price must be a positive number, not 0"),
            (("price",), math.inf, "price must be a positive number, not inf"),
            (("prise",), 1, "impact has an unknown figure, prise"),
            (("messages_per_week",), -5, "messages_per_week must be a positive number, not -5"),
            (("messages_per_week",), 5, "messages_per_week must be at least 7, one a day, not 5"),
            (("days",), 3.7, "days must be a whole number of at least 2, not 3.7"),
            (("bars",), None, "bars must be a table of figures, not None"),
            (("bars", "complaints"), 1.5, "complaints must be a share between 0 and 1, not 1.5"),
            (("bars", "spam"), 0.2, "the bar on spam, 0.2, must lie below the share of spam, 0.2"),
            (("experiment",), [], "experiment must be a table of figures, not []"),
            (("experiment", "power"), 80, "power must be a share between 0 and 1, not 80"),
            (("experiment", "power"), "high", "power must be a share between 0 and 1, not 'high'"),
            (("experiment", "power"), 0.03, "power must lie above alpha"),
            (("experiment", "churn_change"), -0.002, "churn_change must be a share between 0 and 1, not -0.002"),
            (("experiment", "users"), 20, "users must be a whole number of at least 1000, not 20"),
            (("experiment", "shares"), {"filtered": 0.5, "unfiltered": 0.4}, "the shares of the arms must add up to 1"),
            (
                ("experiment", "shares"),
                {"filtered": 1.2, "unfiltered": -0.2},
                "the share of 'filtered' must be a number",
            ),
            (("experiment", "shares"), {"filtered": 1.0}, "shares lacks unfiltered"),
            (("experiment", "shares"), None, "shares must be a table of figures, not None"),
            (("regions",), {}, "regions is empty: name at least one region"),
            (("regions",), None, "regions is empty: name at least one region"),
            (("regions",), ["north"], "regions must be a table of figures, not ['north']"),
            (("regions", "north"), None, "region north must be a table of figures, not None"),
            (("regions", "north", "share"), 0.5, "the shares of the regions must add up to 1"),
            (("regions", "north", "spam"), 1.5, "spam of region north must be a number between 0 and 1, not 1.5"),
            (("regions", "north", "spam"), 0, "spam of region north must be a number between 0 and 1, not 0"),
            (("regions", "north", "messages"), -7, "messages of region north must be a number above 0, not -7"),
        ],
    )
    def test_nonsense_is_told_in_a_sentence(self, impact, path, value, message):
        figures = copy.deepcopy(IMPACT)
        *above, last = path
        part = figures
        for name in above:
            part = part[name]
        part[last] = value
        with pytest.raises(ValueError, match=re.escape(message)) as raised:
            impact.check_impact(figures, 0.2)
        assert "\n" not in str(raised.value)

    def test_a_missing_figure_is_named(self, impact):
        figures = copy.deepcopy(IMPACT)
        del figures["experiment"]["canary"]
        with pytest.raises(ValueError, match=r"experiment lacks canary\."):
            impact.check_impact(figures, 0.2)

    def test_those_of_the_project_pass(self, impact):
        impact.check_impact(IMPACT, 0.2)


class TestMoney:
    """From measured rates to what an operator earns."""

    def test_rates_are_drawn_around_what_was_seen(self, impact, random):
        labels = np.repeat([0, 1], [400, 100])
        acted = np.concatenate([np.arange(400) < 20, np.arange(100) < 70])
        blocked, missed = impact.draw_rates(labels, acted, random)
        assert blocked.mean() == pytest.approx(0.05, abs=0.005)
        assert missed.mean() == pytest.approx(0.30, abs=0.01)
        narrow, _ = impact.draw_rates(labels, acted, random, times=16)
        assert narrow.std() == pytest.approx(blocked.std() / 4, rel=0.05)

    def test_a_filter_that_does_nothing_changes_nothing(self, impact):
        found = impact.outcome(0.0, 1.0, impact.likely_case(IMPACT), 0.2)
        assert found["spam"] == pytest.approx(0.2)
        assert found["lost"] == found["complaints"] == found["churn"] == 0
        loss = 0.1 * IMPACT["engagement"][1] * IMPACT["revenue"][1]  # ten points above the bar
        ham = IMPACT["messages_per_week"] * 0.8
        assert found["earned"] == pytest.approx(ham * IMPACT["price"] * (1 - loss))

    def test_by_hand(self, impact):
        case = {
            **impact.likely_case(IMPACT),
            "messages_per_week": 100,
            "complaint": 0.01,
            "churn": 0.5,
            "spam_price": 0.02,
        }
        found = impact.outcome(0.05, 0.25, case, 0.2)
        assert found["spam"] == pytest.approx(5 / (5 + 76))
        assert found["lost"] == pytest.approx(4)
        assert found["complaints"] == pytest.approx(1 - np.exp(-0.08))
        assert found["churn"] == pytest.approx(found["complaints"] / 2)
        assert found["earned"] == pytest.approx(76 * IMPACT["price"] * (1 - found["churn"]) + 5 * 0.02)

    def test_draws_stay_within_their_ranges(self, impact, random):
        case = impact.draw_case({**IMPACT, "churn": [0.2, 0.2, 0.2]}, random, 1000)
        assert set(case["churn"]) == {0.2}
        low, likely, high = IMPACT["engagement"]
        assert low <= case["engagement"].min() < likely < case["engagement"].max() <= high

    def test_a_sweep_starts_and_ends_where_it_must(self, impact, random):
        labels, propensities = np.repeat([0, 1], 200), np.linspace(0, 1, 400)
        swept = impact.sweep(labels, propensities, np.array([0.0, 0.5, 1.0]), IMPACT, 0.2, random, 500)
        assert swept["spam"].shape == (3, 3)
        assert swept["spam"][2, 1] == pytest.approx(0.2, abs=0.01)  # at 1 nothing is taken down
        assert swept["lost"][0, 1] == pytest.approx(IMPACT["messages_per_week"] * 0.8, rel=0.02)  # at 0 all is
        assert (np.diff(swept["gain"], axis=1) >= 0).all()

    def test_a_tornado_moves_one_figure_at_a_time(self, impact):
        rates = {"blocked": (0.01, 0.02, 0.03), "missed": (0.3, 0.4, 0.5)}
        table = impact.tornado(IMPACT, rates, 0.2)
        assert set(table.index) == {*impact.RANGES, *rates}
        widths = (table["high"] - table["low"]).abs()
        assert widths.is_monotonic_increasing
        assert table.loc["blocked", "low"] > table.loc["blocked", "high"]
        case = {**impact.likely_case(IMPACT), "spam_price": IMPACT["spam_price"][2]}
        gain = impact.outcome(0.02, 0.4, case, 0.2)["earned"] / impact.outcome(0.0, 1.0, case, 0.2)["earned"] - 1
        assert table.loc["spam_price", "high"] == pytest.approx(gain)

    @pytest.mark.parametrize(
        ("count", "verdict"),
        [(10, "met"), (150, "not met"), (45, r"cannot tell; \d+,\d{3} messages would"), (50, "cannot tell, however")],
    )
    def test_verdicts(self, impact, count, verdict):
        def draw(times):
            return np.random.default_rng(0).beta(times * count + 0.5, times * (1000 - count) + 0.5, 10_000)

        assert re.match(verdict, impact.judge(draw, 0.05, 1000)["verdict"])


class TestPlan:
    """How many users an experiment takes."""

    def test_one_message_a_user_needs_no_design_effect(self, impact):
        alone = impact.plan_spam_share(0.2, 0.1, 1, 0.5, 0.05, 0.8)
        assert alone == pytest.approx(199, abs=3)  # of two proportions, as tables have it
        assert impact.plan_spam_share(0.2, 0.1, 10, 1.0, 0.05, 0.8) == alone  # ten alike tell as much as one
        assert impact.plan_spam_share(0.2, 0.1, 10, 0.0, 0.05, 0.8) == pytest.approx(alone / 10, abs=2)

    def test_a_proportion_as_in_tables(self, impact):
        spread = 0.2 * 0.8 + 0.3 * 0.7
        expected = (norm.isf(0.025) + norm.isf(0.2)) ** 2 * spread / 0.1**2
        assert impact.plan_proportion(0.2, 0.1, 0, 0.05, 0.8) == pytest.approx(expected, rel=0.05)

    @pytest.mark.parametrize("power", [0.7, 0.9])
    def test_the_planned_power_is_had(self, impact, random, power):
        users = impact.plan_spam_share(0.2, 0.1, 7, 0.05, 0.05, power)
        assert impact.found_spam_share(users, 0.2, 0.1, 7, 0.05, 0.05, random, 4000) == pytest.approx(power, abs=0.03)
        users = impact.plan_proportion(0.05, 0.01, 0.03, 0.05, power)
        found = impact.found_proportion(users, 0.05, 0.01, 0.03, 0.05, random, 4000)
        assert found == pytest.approx(power, abs=0.03)


class TestSimulation:
    """Users, days and what an analysis makes of them."""

    def test_users_are_as_the_regions_say(self, impact, random):
        users = impact.draw_users(100_000, IMPACT, random)
        means = users.groupby("region")[["messages", "spam"]].mean()
        for name, region in IMPACT["regions"].items():
            assert (users["region"] == name).mean() == pytest.approx(region["share"], abs=0.01)
            assert means.loc[name, "messages"] == pytest.approx(region["messages"], rel=0.03)
            assert means.loc[name, "spam"] == pytest.approx(region["spam"], rel=0.03)

    def test_what_happens_is_what_was_expected(self, impact, random):
        users = impact.draw_users(50_000, IMPACT, random)
        expected = impact.expect(users, True, IMPACT, 0.02, 0.4)
        happened = impact.draw_period(expected, 14, IMPACT, random)
        for name in ("spam", "active", "earned"):
            assert happened[name].mean() == pytest.approx(14 * expected[name].mean(), rel=0.01)
        assert set(np.unique(happened["complained"])) == set(np.unique(happened["left"])) == {0, 1}

    def test_without_a_filter_nothing_is_lost(self, impact, random):
        users = impact.draw_users(1000, IMPACT, random)
        unfiltered = impact.expect(users, False, IMPACT, 0.02, 0.4)
        assert (unfiltered["lost"] == 0).all()
        np.testing.assert_allclose(unfiltered["spam"], users["messages"] * users["spam"])
        filtered = impact.expect(users, True, IMPACT, 0.02, 0.4)
        np.testing.assert_allclose(filtered["spam"], 0.4 * unfiltered["spam"])
        lost = (filtered["lost"] / (users["messages"] * (1 - users["spam"]))).groupby(users["region"]).mean()
        for name, region in IMPACT["regions"].items():
            assert lost[name] == pytest.approx(0.02 * region["ham_blocked"])

    def test_statistics_of_the_arms(self, impact, random):
        values, arms = random.normal(size=(60, 2)), random.random((5, 60)) < 0.4
        difference, error = impact.arm_statistics(values, arms)
        for round_, arm in enumerate(arms):
            one, other = values[arm], values[~arm]
            np.testing.assert_allclose(difference[round_], one.mean(axis=0) - other.mean(axis=0))
            expected = one.var(axis=0, ddof=1) / len(one) + other.var(axis=0, ddof=1) / len(other)
            np.testing.assert_allclose(error[round_] ** 2, expected)

    def test_sequential_bounds_are_those_of_the_tables(self, impact):
        """Lan and DeMets' bounds after O'Brien and Fleming for five equal looks, as ldbounds of R gives them."""
        bounds = impact.sequential_bounds(np.arange(1, 6) / 5, 0.05)
        np.testing.assert_allclose(bounds, [4.877, 3.357, 2.680, 2.290, 2.031], atol=0.002)
        assert impact.sequential_bounds(np.array([1.0]), 0.05)[0] == pytest.approx(1.96, abs=0.001)

    def test_sequential_bounds_keep_their_promise(self, impact, random):
        walks = random.normal(size=(40_000, 14)).cumsum(axis=1) / np.sqrt(np.arange(1, 15))
        bounds = impact.sequential_bounds(np.arange(1, 15) / 14, 0.05)
        assert (abs(walks) > bounds).any(axis=1).mean() == pytest.approx(0.05, abs=0.004)

    def test_what_was_foretold_is_removed(self, impact, random):
        before = random.normal(size=(3, 2000))
        noise = random.normal(size=(3, 2000))
        adjusted = impact.remove_predicted(5 + 2 * before + noise, before)
        np.testing.assert_allclose(adjusted.mean(axis=1), (5 + 2 * before + noise).mean(axis=1))
        np.testing.assert_allclose(adjusted.std(axis=1), noise.std(axis=1), rtol=0.01)

    def test_the_average_of_the_regions_holds_the_effect(self, impact, random):
        users = impact.draw_users(8000, IMPACT, random)
        before, filtered = random.normal(10, 3, 8000), random.random(8000) < 0.5
        outcome = before + random.normal(0, 1, 8000) + 0.5 * filtered
        found = impact.average(impact.by_region(outcome, before, filtered, users["region"], 0.05))
        assert found["low"] < 0.5 < found["high"]
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 2 / np.sqrt(8000), rel=0.05)

    def test_the_average_covers_the_truth(self, impact, random):
        covered, truth = [], None
        for _ in range(200):
            users = impact.draw_users(2000, IMPACT, random)
            filtered = random.random(2000) < 0.5
            before, after = (
                impact.draw_period(impact.expect(users, on, IMPACT, 0.01, 0.4), 14, IMPACT, random)["spam"]
                for on in (False, filtered)
            )
            if truth is None:
                many = impact.draw_users(200_000, IMPACT, random)
                on, off = (impact.expect(many, on, IMPACT, 0.01, 0.4)["spam"].mean() for on in (True, False))
                truth = 14 * (on - off)
            found = impact.average(impact.by_region(after, before, filtered, users["region"], 0.05))
            covered.append(found["low"] < truth < found["high"])
        assert np.mean(covered) == pytest.approx(0.95, abs=0.045)

    def test_the_error_of_a_share_of_spam_counts_users(self, impact, random):
        spread, found = 19, []
        for _ in range(300):
            delivered = random.poisson(50, 400) + 1
            spam = random.binomial(delivered, random.beta(0.2 * spread, 0.8 * spread, 400))
            found.append(impact.share_of_spam(spam, delivered))
        shares, errors = np.array(found).T
        assert shares.mean() == pytest.approx(0.2, abs=0.002)
        assert errors.mean() == pytest.approx(shares.std(), rel=0.12)

    def test_several_looks_are_paid_for(self, impact, random):
        region = pd.Series(list("abcd") * 500)
        outcome, before = random.normal(size=2000), random.normal(size=2000)
        filtered = random.random(2000) < 0.5
        plain = impact.by_region(outcome, before, filtered, region, 0.05)
        assert not plain["not zero"].any()
        raised = impact.by_region(outcome + 2 * filtered * (region == "b").to_numpy(), before, filtered, region, 0.05)
        assert list(raised.index[raised["not zero"].astype(bool)]) == ["b"]
        assert raised.loc["b", "low"] < 2 < raised.loc["b", "high"]

    def test_a_rise_is_ruled_out_only_with_enough_users(self, impact):
        def users(count, complained):
            return np.tile(np.arange(count) < complained, 2).astype(int), np.repeat([True, False], count)

        assert impact.rule_out(*users(20_000, 40), 0.01, 0.05)["ruled out"]
        assert not impact.rule_out(*users(200, 0), 0.01, 0.05)["ruled out"]

    @pytest.mark.parametrize(
        ("complaints", "ruled_out", "not_zero", "earned", "decision"),
        [
            (0.02, False, False, (-0.1, 0.3), "roll back"),  # complaints surely rise
            (0.001, True, True, (-0.3, -0.1), "roll back"),  # less is surely earned
            (0.001, True, True, (0.1, 0.3), "launch"),
            (0.001, True, False, (-0.04, 0.02), "launch"),  # a loss that would matter is ruled out
            (0.001, True, False, (-0.2, 0.1), "hold"),  # and here it is not
            (0.001, False, True, (0.1, 0.3), "hold"),
        ],
    )
    def test_decisions(self, impact, complaints, ruled_out, not_zero, earned, decision):
        rise = {"low": complaints, "ruled out": ruled_out}
        row = {"not zero": not_zero, "low": earned[0], "effect": sum(earned) / 2}
        assert impact.decide(rise, row, 0.01, 0.05) == decision


def test_labels_that_never_come_back_bias_what_is_learnt(definitions, random):
    impact = definitions("impact.ipynb")
    labels = (random.random(4000) < 0.2).astype(int)
    features = np.column_stack([labels + random.normal(0, 0.7, 4000), random.normal(size=4000)])
    weeks = np.arange(4000).reshape(8, 500)

    def believed(passes):
        learnt = impact.learn_weekly(weeks, features, labels, LogisticRegression, passes, 0.5, np.random.default_rng(2))
        return learnt[-1][0]

    assert believed(1.0) == pytest.approx(labels.mean())
    assert believed(0.0) < 0.8 * labels.mean()
    assert believed(0.3) == pytest.approx(labels.mean(), abs=0.02)


@pytest.fixture(scope="module")
def report(prepared):
    """What impact.ipynb prints in a clone with the data."""
    done, executed = run_notebook(ROOT / "impact.ipynb", prepared)
    assert done.returncode == 0, done.stderr[-3000:]
    return printed(executed)


@pytest.mark.notebook
class TestReport:
    """The simulations keep their promises."""

    def test_coverage(self, report):
        rows = re.findall(r"^(spam|active|earned) +([\d.]+)% +([\d.]+)%", report, re.M)
        assert len(rows) == 3
        for _, *coverages in rows:
            assert all(93 <= float(coverage) <= 97 for coverage in coverages)

    def test_false_alarms(self, report):
        rates = {
            name.strip(): float(rate)
            for name, rate in re.findall(r"^((?:messages as|users as|users,)[^\n%]*?) +([\d.]+)%", report, re.M)
        }
        assert rates["messages as the unit, once at the end"] > 20
        assert 4 <= rates["users as the unit, once at the end"] <= 6
        assert rates["users, every day until it is significant"] > 8
        assert rates["users, every day, sequential bounds"] <= 5.5

    def test_power(self, report):
        powers = re.findall(r"^(?:spam from|complaints rise|churn rises).* ([\d.]+)% +([\d.]+)%$", report, re.M)
        assert len(powers) == 3
        for planned, simulated in powers:
            assert abs(float(planned) - float(simulated)) <= 3

    def test_the_region_that_is_harmed_is_found(self, report):
        decisions = dict(re.findall(r"^(\w+) .*?(launch|hold|roll back) *$", report, re.M))
        assert decisions["isles"] == "roll back"
        assert "launch" in decisions.values()
