"""What tells that messages, or what a model makes of them, are no longer what they were.

A *reference* holds, for each column of a table of messages, how many of them lay in each bin: small and plain, so that
it travels in the card of a model. A *window* is such a table of other messages. They are compared column by column, by
a test that knows that both are samples, corrected for the number of columns; and as with a million messages every
difference is significant, an alarm takes one that matters.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2_contingency, fisher_exact

from engine.text import DIGIT

COUNTED = {  # in a text, each match of a pattern
    "digits": DIGIT,
    "capitals": re.compile("[A-Z]"),
    "non_ascii": re.compile(r"[^\x00-\x7f]"),
    "links": re.compile(r"(?i)https?://\S+|(?<![\w.-])(?:[a-z0-9-]+\.)+[a-z]{2,7}\b"),  # and what looks like one
}
LEAST = 0.02  # of the reference, in a bin


def text_features(texts: Iterable[str]) -> pd.DataFrame:
    """Return what is counted in texts, for watching only: `characters`, `words` and those of COUNTED, a row a text."""
    rows = [(len(text), len(text.split()), *(len(one.findall(text)) for one in COUNTED.values())) for text in texts]
    return pd.DataFrame(rows, columns=["characters", "words", *COUNTED])


def watched(
    texts: Iterable[str], propensities: np.ndarray, threshold: float, labels: np.ndarray | None = None
) -> pd.DataFrame:
    """Return the columns that are compared, a row a message.

    Args:
        texts, propensities: of the messages, and what a model made of them.
        threshold: from which they are taken down.
        labels: 1 for spam, 0 for ham; None where nobody knows.

    Returns:
        The columns of `text_features`, `propensity`, `prediction`, and with labels `wrong`.
    """
    prediction = np.asarray(propensities) >= threshold
    data = text_features(texts).assign(propensity=np.asarray(propensities), prediction=prediction)
    return data if labels is None else data.assign(wrong=prediction != (np.asarray(labels) == 1))


def summarise(data: pd.DataFrame, groups: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the reference that windows are compared with, ready for JSON.

    Args:
        data: a row a message, with columns of numbers or truth values. Missing values are a bin of their own.
        groups: of each message, such as "ham" or "spam", so that they can be mixed anew; all are one if None.

    Returns:
        "edges": where the bins of each column end; "messages" of each group; "counts" of each group, column and bin.
    """
    edges = {name: _edges(column.dropna().to_numpy(float)) for name, column in data.items()}
    parts = {str(name): part for name, part in data.groupby(np.asarray(groups))} if groups is not None else {"": data}
    counts = {
        group: {name: _count(column, edges[name]).tolist() for name, column in part.items()}
        for group, part in parts.items()
    }
    return {"edges": edges, "messages": {group: len(part) for group, part in parts.items()}, "counts": counts}


def mix(reference: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, Any]:
    """Return a reference in which each group has another share, as if fewer messages of the others had been drawn.

    Args:
        reference: from `summarise`.
        shares: of the groups to mix; they add up to 1.
    """
    sizes = reference["messages"]
    total = min(sizes[group] / share for group, share in shares.items() if share)
    weights = {group: total * share / sizes[group] for group, share in shares.items()}
    counts = {
        group: {name: [weight * count for count in bins] for name, bins in reference["counts"][group].items()}
        for group, weight in weights.items()
    }
    sizes = {group: total * share for group, share in shares.items()}
    return {"edges": reference["edges"], "messages": sizes, "counts": counts}


def compare(reference: Mapping[str, Any], window: pd.DataFrame, alpha: float, least: float) -> pd.DataFrame:
    """Compare a window with a reference, by a chi-squared test of each column that both have.

    Args:
        reference: from `summarise` or `mix`; its groups are taken together.
        window: a row a message, with columns as in `summarise`.
        alpha: chance of any false alarm where messages come one by one and nothing has changed.
        least: the smallest distance that gives an alarm.

    Returns:
        A row a column, the most distant first: `distance` (share of messages that would have to lie in another bin),
        `p`, `corrected` (Holm's) and `alarm`; and of the bin that has changed most, its name `bin`, and its share
        `before` and `now`.

    Raises:
        ValueError: the window has no message, or no column of the reference.
    """
    names = [name for name in reference["edges"] if name in window]
    if window.empty or not names:
        raise ValueError("there is nothing to compare: the window has no message, or no column of the reference")
    rows = []
    for name in names:
        edges = reference["edges"][name]
        before = np.sum([counts[name] for counts in reference["counts"].values()], axis=0)
        both = np.array([before, _count(window[name], edges)])
        shares = both / both.sum(axis=1, keepdims=True)
        most = np.abs(shares[1] - shares[0]).argmax()
        rows.append(
            {
                "distance": np.abs(shares[1] - shares[0]).sum() / 2,
                "p": chi2_contingency(both[:, both.any(axis=0)], correction=False).pvalue,
                "bin": _name(edges, most),
                "before": shares[0, most],
                "now": shares[1, most],
            }
        )
    table = pd.DataFrame(rows, index=names)
    corrected = holm(table["p"].to_numpy())
    table = table.assign(corrected=corrected, alarm=(corrected < alpha) & (table["distance"] >= least))
    return table.sort_values("distance", ascending=False)


def holm(p: np.ndarray) -> np.ndarray:
    """Return p values corrected for their number, by Holm's method (1979).

    statsmodels has it too, but collects garbage at each call, which takes ten times as long as all the tests.
    """
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected


def segment_gaps(wrong: Iterable[bool], segments: Iterable[Any], alpha: float) -> pd.DataFrame:
    """Compare the share of wrong decisions in each segment with that in all others, by Fisher's test.

    Args:
        wrong: whether the decision on each message was wrong.
        segments: of each message, such as its region.
        alpha: chance of any false alarm; the intervals are for one segment each, with a confidence of 1 - alpha.

    Returns:
        A row a segment, the widest gap first: `messages`, `share` of wrong ones, `gap` to the share elsewhere, `low`
        and `high` (its interval, by Newcombe), `p`, `corrected` (Holm's), and `alarm` where more is wrong than
        elsewhere. It is empty where all messages are of one segment.
    """
    from statsmodels.stats.proportion import confint_proportions_2indep  # here, because it takes a second

    counts = pd.DataFrame({"wrong": np.asarray(wrong, dtype=bool)}).groupby(np.asarray(segments))["wrong"]
    counts = counts.agg(["sum", "size"])
    rows = {}
    for name, (count, size) in counts.iterrows():
        others, rest = counts["sum"].sum() - count, counts["size"].sum() - size
        if rest:
            low, high = confint_proportions_2indep(count, size, others, rest, "newcomb", "diff", alpha)
            found = {"messages": size, "share": count / size, "gap": count / size - others / rest}
            p = fisher_exact([[count, size - count], [others, rest - others]]).pvalue
            rows[name] = {**found, "low": low, "high": high, "p": p}
    columns = ["messages", "share", "gap", "low", "high", "p"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    corrected = holm(table["p"].to_numpy())
    table = table.assign(corrected=corrected, alarm=(corrected < alpha) & (table["gap"] > 0))
    return table.sort_values("gap", ascending=False)


def _edges(values: np.ndarray) -> list[float]:
    """Return the tenths of values, without those that would make a bin of nearly nothing."""
    edges, below = [], 0.0
    ends = np.quantile(values, np.arange(1, 10) / 10, method="inverted_cdf") if len(values) else values
    for end in np.unique(ends.round(3)).tolist():
        share = np.mean(values <= end)
        if share - below >= LEAST and (1 - share >= LEAST or not edges):
            edges.append(end)
            below = share
    return edges


def _count(column: pd.Series, edges: list[float]) -> np.ndarray:
    """Return how many values of a column lie in each bin; the last one is of those that are missing."""
    values = column.to_numpy(float, na_value=np.nan)
    bins = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values))
    return np.bincount(bins, minlength=len(edges) + 2)


def _name(edges: list[float], number: int) -> str:
    """Return the name of a bin."""
    if number > len(edges):
        return "missing"
    if number == len(edges):
        return f"above {edges[-1]:g}" if edges else "all"
    return f"{edges[number - 1]:g} to {edges[number]:g}" if number else f"up to {edges[0]:g}"
