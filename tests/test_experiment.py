"""Who is in which arm of an experiment."""

import math
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from engine.experiment import assign

USERS = [f"user-{number}" for number in range(20_000)]
HALVES = {"filtered": 0.5, "unfiltered": 0.5}
names = st.text(max_size=20)


@st.composite
def arms(draw):
    """Shares of one to five arms that add up to 1."""
    weights = draw(st.lists(st.integers(1, 100), min_size=1, max_size=5))
    return {f"arm {number}": weight / sum(weights) for number, weight in enumerate(weights)}


@given(names, names, arms())
def test_gives_an_arm_and_always_the_same(user, experiment, shares):
    arm = assign(user, experiment, shares)
    assert arm in shares
    assert assign(user, experiment, dict(shares)) == arm


def test_is_the_same_in_another_process():
    program = (
        "from engine.experiment import assign; print([assign(f'user-{n}', 'x', {'a': .5, 'b': .5}) for n in range(50)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str([assign(f"user-{n}", "x", {"a": 0.5, "b": 0.5}) for n in range(50)])


@pytest.mark.parametrize("shares", [HALVES, {"a": 0.01, "b": 0.99}, {"a": 0.2, "b": 0.3, "c": 0.5}])
@pytest.mark.parametrize("experiment", ["filter-2026", "", "z"])
def test_arms_are_as_large_as_their_shares(experiment, shares):
    got = [assign(user, experiment, shares) for user in USERS]
    counts = [got.count(arm) for arm in shares]
    assert chisquare(counts, [share * len(USERS) for share in shares.values()]).pvalue > 1e-4


@pytest.mark.parametrize("other", ["filter-2027", "filter-2026 ", "f"])
def test_experiments_are_independent(other):
    pairs = [(assign(user, "filter-2026", HALVES), assign(user, other, HALVES)) for user in USERS]
    table = [[pairs.count((one, two)) for two in HALVES] for one in HALVES]
    assert chi2_contingency(table).pvalue > 1e-4


@given(names, names, st.floats(0, 1), st.floats(0, 1))
def test_nobody_leaves_the_first_arm_when_it_grows(user, experiment, one, other):
    less, more = sorted((one, other))
    if assign(user, experiment, {"filtered": less, "unfiltered": 1 - less}) == "filtered":
        assert assign(user, experiment, {"filtered": more, "unfiltered": 1 - more}) == "filtered"


@given(names, arms(), st.floats(0, 1))
def test_arms_before_a_changed_one_keep_their_users(user, shares, part):
    first = next(iter(shares))
    arm = assign(user, "x", shares)
    changed = {first: shares[first], "new": (1 - shares[first]) * part, "rest": (1 - shares[first]) * (1 - part)}
    assert (assign(user, "x", changed) == first) == (arm == first)


@given(names, names)
def test_an_arm_without_a_share_gets_nobody(user, experiment):
    assert assign(user, experiment, {"nobody": 0, "all": 1, "no one": 0.0}) == "all"


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 1.5, "b": -0.5}, "the share of 'a' must be a number from 0 to 1, not 1.5"),
        ({"a": 0.5, "b": 0.4}, "the shares of the arms must add up to 1, not to 0.9"),
        ({"a": math.nan, "b": 1}, "the share of 'a' must be a number from 0 to 1, not nan"),
        ({"a": True}, "the share of 'a' must be a number from 0 to 1, not True"),
        ({"a": "1"}, "the share of 'a' must be a number from 0 to 1, not '1'"),
        ({}, "the shares of the arms must add up to 1, not to 0"),
    ],
)
def test_bad_shares(shares, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        assign("user", "experiment", shares)


@pytest.mark.parametrize("arguments", [(1, "experiment"), ("user", None)])
def test_names_are_strings(arguments):
    with pytest.raises(TypeError, match="must be a string, not"):
        assign(*arguments, HALVES)
