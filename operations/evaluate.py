"""Tell how well the filter does on a labelled file of your own: `python -m operations.evaluate messages.csv`.

The saved model scores every message. No text is ever printed: what is wrong with a message is said with its row,
which in a table counts the header as row 1, as a spreadsheet does.
"""

import argparse
import csv
import io
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score

from engine.fields import LONGEST_TEXT
from score import load_card, load_model, score_batch

PARAMS = Path(__file__).resolve().parents[1] / "params.yaml"
TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
TABLES = {".csv": {}, ".tsv": TABS, ".txt": TABS}
LABELS = {"ham": 0, "0": 0, "false": 0, "spam": 1, "1": 1, "true": 1}
BY = ("source", "kind", "country")
ROUNDS = 1000
SHOWN = 20  # values of a column in the table; --json has all of them


def read(path: Path) -> pd.DataFrame:
    """Read a table, JSON lines or Parquet, by the ending of the file's name.

    Returns:
        The cells as they stand; the index holds their rows.

    Raises:
        ValueError: the file is missing, not UTF-8 or not what its ending says; the message is one sentence.
    """
    ending, header, rows, number = path.suffix.lower(), None, {}, 0
    if ending not in {*TABLES, ".jsonl", ".json", ".parquet"}:
        raise ValueError(f"{path} must end in .csv, .tsv, .txt, .jsonl, .json or .parquet.")
    try:
        content = path.read_bytes()
        if ending == ".parquet":
            data = pd.read_parquet(io.BytesIO(content)).astype(object)
            return data.set_axis(range(1, len(data) + 1))
        text = content.decode("utf-8-sig")
    except ImportError:
        raise ValueError("Parquet takes pyarrow, which is not installed here: save the file as CSV.") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8.") from None
    except (OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not Parquet'}.") from None
    try:
        if ending in TABLES:
            for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True, **TABLES[ending]), 1):
                header = header or cells
                if cells and len(cells) != len(header):
                    raise ValueError
                if cells and cells is not header:
                    rows[number] = cells
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows[number] = json.loads(line)
                    if not isinstance(rows[number], dict):
                        raise ValueError
                    "".join(rows[number]).encode()  # half of a surrogate pair cannot name a column
    except csv.Error as error:  # met in the row after the last one that was read
        raise ValueError(f"{path}, row {number + 1}: {error}.") from None
    except (ValueError, RecursionError):
        what = "it must have as many fields as the header" if ending in TABLES else "each line must be a JSON object"
        raise ValueError(f"{path}, row {number}: {what}.") from None
    return pd.DataFrame(list(rows.values()), index=list(rows), columns=header, dtype=object)


def read_messages(path: Path, text: str, label: str, by: list[str]) -> pd.DataFrame:
    """Read a labelled file and check every message.

    Args:
        path: the file.
        text, label: the names of the columns of texts and labels.
        by: the names of other columns that it must have.

    Returns:
        All its columns, with 0 for ham and 1 for spam as the label.

    Raises:
        ValueError: as `read`; or a column is missing, or a text or a label is not one.
    """
    if text in (label, *by):
        raise ValueError(f"'{text}' holds the texts, so it cannot be the label or a column to group by.")
    data = read(path)
    if data.empty:
        raise ValueError(f"{path} holds no messages.")
    for column, option in ((text, "--text"), (label, "--label"), *((name, "--by") for name in by)):
        if list(data.columns).count(column) != 1:
            why = "; without the label of every message, ham or spam, nothing can be measured"
            raise ValueError(
                f"{path} must have one column '{column}', or {option} must name another"
                f"{why if option == '--label' else ''}."
            )
    data[label] = [str(value).strip().lower() for value in data[label]]
    for row, message, value in zip(data.index, data[text], data[label], strict=True):
        wrong = None
        if not isinstance(message, str) or not message.strip():
            wrong = "the text is blank or not a text"
        elif len(message) > LONGEST_TEXT:
            wrong = f"the text has {len(message):,} characters, more than {LONGEST_TEXT:,}"
        elif value not in LABELS:
            wrong = "the label must be ham or spam, 0 or 1, false or true"
        if wrong:
            raise ValueError(f"{path}, row {row}: {wrong}.")
    data[label] = data[label].map(LABELS).astype(int)
    return data


def count_shares(labels: np.ndarray, acted: np.ndarray) -> dict[str, Any]:
    """Count ham and spam, and what share of each is taken down, with its 95% Wilson interval.

    Args:
        labels: 0 for ham and 1 for spam.
        acted: whether each message is taken down.

    Returns:
        "messages", "ham", "spam"; "ham_blocked" and "spam_caught", None where there is no such message.
    """
    counts = {"messages": len(labels), "ham": int((labels == 0).sum()), "spam": int((labels == 1).sum())}
    shares = {}
    for name, of, taken in (("ham_blocked", "ham", acted[labels == 0]), ("spam_caught", "spam", acted[labels == 1])):
        shares[name] = None
        if counts[of]:
            low, high = map(float, binomtest(int(taken.sum()), counts[of]).proportion_ci(method="wilson"))
            shares[name] = {"value": float(taken.mean()), "low": low, "high": high, "count": int(taken.sum())}
    return counts | shares


def bootstrap(labels: np.ndarray, propensities: np.ndarray, costs: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Draw whole groups with replacement, again and again, and see how AUCPR and cost vary.

    Args:
        labels, propensities, costs: of each message; the cost is that of the decision on it.
        groups: the number of each message's group, counted from 0.

    Returns:
        Array of shape (2, 2): the 2.5% and 97.5% quantiles of AUCPR, and those of the cost of 1,000 messages.
    """
    random, n_groups, draws = np.random.default_rng(0), groups.max() + 1, []
    order = np.argsort(-propensities)
    labels, propensities, costs, groups = labels[order], propensities[order], costs[order], groups[order]
    last = np.flatnonzero(np.append(np.diff(propensities), 1))  # the last message of each propensity
    for _ in range(ROUNDS):
        times = np.bincount(random.integers(0, n_groups, n_groups), minlength=n_groups)[groups]
        spam, taken = np.cumsum(times * labels)[last], np.cumsum(times)[last]
        steps = np.diff(spam, prepend=0) * spam / np.maximum(taken, 1)  # recall rises only where messages were drawn
        aucpr = steps.sum() / spam[-1] if spam[-1] else np.nan
        draws.append((aucpr, 1000 * (times * costs).sum() / taken[-1]))
    return np.nanquantile(draws, [0.025, 0.975], axis=0).T


def project(blocked: dict[str, Any], caught: dict[str, Any], spam_share: float, ham_cost: float) -> dict[str, Any]:
    """Carry the shares of ham and of spam over to messages of which another share is spam.

    Args:
        blocked, caught: "value", "low" and "high" of the share of ham blocked and of spam caught.
        spam_share: share of spam among the messages.
        ham_cost: of a ham blocked, where a spam delivered costs 1.

    Returns:
        "precision" of what is taken down, "spam_delivered" among what is delivered, "cost" of 1,000 messages; None
        where nothing is taken down or delivered. Their bounds are reached with both shares at their best, and with
        both at their worst, so the intervals are rather too wide than too narrow.
    """
    results = []
    for b, c in (("value", "value"), ("low", "high"), ("high", "low")):
        wrong, right = (1 - spam_share) * blocked[b], spam_share * caught[c]
        missed, passed = spam_share * (1 - caught[c]), (1 - spam_share) * (1 - blocked[b])
        results.append(
            {
                "precision": right / (right + wrong) if right + wrong else None,
                "spam_delivered": missed / (missed + passed) if missed + passed else None,
                "cost": 1000 * (ham_cost * wrong + missed),
            }
        )
    value, *ends = results
    bounds = {name: sorted(end[name] for end in ends) for name in value}
    return {
        name: None if value[name] is None else {"value": value[name], "low": low, "high": high}
        for name, (low, high) in bounds.items()
    }


def slice_by(values: pd.Series, labels: np.ndarray, acted: np.ndarray, share: float, ham_cost: float) -> list[dict]:
    """Count the shares for each value of a column, the value with the highest cost first.

    Args:
        values: one of each message.
        labels, acted: as for `count_shares`.
        share, ham_cost: share of spam and cost of ham at which the values are compared.

    Returns:
        For each value what `count_shares` returns, with "value" and, where it has both classes, "cost".
    """
    names = [str(value).strip() for value in values]
    names = ["(empty)" if name in ("", "None", "nan", "NaT", "<NA>") else name for name in names]
    names = pd.Series(["".join(c if c.isprintable() else "?" for c in name) for name in names])
    rows = []
    for value, at in names.groupby(names).indices.items():
        counts = count_shares(labels[at], acted[at])
        blocked, caught = counts["ham_blocked"], counts["spam_caught"]
        of_ham = 1000 * (1 - share) * ham_cost * blocked["value"] if blocked else 0
        of_spam = 1000 * share * (1 - caught["value"]) if caught else 0
        cost = of_ham + of_spam if blocked and caught else None
        rows.append((of_ham + of_spam, {"value": value, **counts, "cost": cost}))
    return [row for _, row in sorted(rows, key=lambda row: -row[0])]


def measure(data: pd.DataFrame, text: str, label: str, by: list[str], threshold: float | None) -> dict[str, Any]:
    """Score the messages with the saved model and compare the decisions with the labels.

    Args:
        data, text, label, by: what `read_messages` returned, and what it was asked for.
        threshold: the propensity from which a message is taken down; None for that of the model's card.

    Returns:
        What --json prints: counts, measures with their intervals, None where the file cannot tell, notes in words.

    Raises:
        OSError, ValueError: the model or params.yaml cannot be loaded, or the threshold is outside [0, 1].
    """
    card, action = load_card(), yaml.safe_load(PARAMS.read_text(encoding="utf-8"))["action"]
    threshold, ham_cost = card["threshold"] if threshold is None else threshold, action["ham_cost"]
    acted, propensities = map(np.array, zip(*score_batch(data[text], load_model(), threshold), strict=True))
    labels, numbers = data[label].to_numpy(), {}
    groups = np.array([numbers.setdefault(message, len(numbers)) for message in data[text]])
    shares, aucpr, cost, projected, notes = count_shares(labels, acted), None, None, None, []
    blocked, caught, copies = shares["ham_blocked"], shares["spam_caught"], len(labels) - len(numbers)
    if blocked and caught:
        costs = np.where(labels == 0, ham_cost * acted, ~acted)
        of_aucpr, of_cost = bootstrap(labels, propensities, costs, groups).tolist()
        aucpr = {"value": float(average_precision_score(labels, propensities)), "low": of_aucpr[0], "high": of_aucpr[1]}
        aucpr["chance"] = float(labels.mean())
        cost = {"value": float(1000 * costs.mean()), "low": of_cost[0], "high": of_cost[1]}
        projected = project(blocked, caught, action["spam_share"], ham_cost)
        if blocked["count"] == 0 or caught["count"] == shares["spam"]:
            kind = "ham is blocked" if blocked["count"] == 0 else "spam is missed"
            notes.append(f"No {kind}, so the interval of the cost of this file is too narrow: it is drawn from errors.")
    else:
        kind, known = ("ham", "ham is blocked") if blocked else ("spam", "spam is caught")
        notes.append(f"All messages are {kind}: the file tells how much {known}, but not AUCPR, cost or precision.")
    if copies:
        notes.append(
            f"Messages that repeat the text of an earlier one: {copies:,}. The intervals of AUCPR and of this file's "
            "cost count such copies as one text; the other intervals do not, and are too narrow."
        )
    else:
        notes.append("No text stands in the file twice.")
    usual = [name for name in BY if list(data.columns).count(name) == 1 and name not in (text, label)]
    return {
        "model": card["name"],
        "threshold": threshold,
        **shares,
        "aucpr": aucpr,
        "cost": cost,
        "spam_share": action["spam_share"],
        "ham_cost": ham_cost,
        "at_spam_share": projected,
        "duplicates": copies,
        "notes": notes,
        "by": {name: slice_by(data[name], labels, acted, action["spam_share"], ham_cost) for name in [*usual, *by]},
    }


def report(measured: dict[str, Any]) -> str:
    """Lay out what was measured for a terminal of 100 columns."""

    def line(name: str, figure: dict[str, Any] | None, form: str, remark: str = "") -> str:
        if figure is None:
            return f"{name:<38}{'-':>8}"
        low, high = (format(figure[end], form) for end in ("low", "high"))
        return f"{name:<38}{figure['value']:>8{form}}   {f'{low} to {high}':<20}{remark}".rstrip()

    def share(figure: dict[str, Any] | None) -> str:
        return "-" if figure is None else "{value:.1%} ({low:.1%} to {high:.1%})".format(**figure)

    def of(name: str, kind: str) -> str:
        return f"{measured[name]['count']:,} of {measured[kind]:,}" if measured[name] else ""

    at_share, cost = measured["at_spam_share"] or {}, f"ham blocked {measured['ham_cost']}, spam missed 1"
    chance = f"chance level {measured['aucpr']['chance']:.3f}" if measured["aucpr"] else ""
    lines = [
        f"{measured['model']} at the threshold {measured['threshold']:g}",
        "",
        f"{'':<38}{'':>8}   95% interval",
        *(f"{name:<38}{measured[name]:>8,}" for name in ("messages", "ham", "spam")),
        line("AUCPR", measured["aucpr"], ".3f", chance),
        line("ham blocked", measured["ham_blocked"], ".2%", of("ham_blocked", "ham")),
        line("spam caught", measured["spam_caught"], ".2%", of("spam_caught", "spam")),
        line("cost of 1,000 messages", measured["cost"], ".1f", cost),
        "",
        f"Where {measured['spam_share']:.0%} of the messages are spam, as in params.yaml",
        line("precision of what is taken down", at_share.get("precision"), ".2%"),
        line("spam among what is delivered", at_share.get("spam_delivered"), ".2%"),
        line("cost of 1,000 messages", at_share.get("cost"), ".1f", cost),
        "",
        *(textwrap.fill(note, 100) for note in measured["notes"]),
    ]
    for name, rows in measured["by"].items():
        lines += ["", f"By {name[:40]}, the highest cost of 1,000 messages with that share of spam first"]
        lines += [f"{'':<20}{'ham':>8}  {'ham blocked':<23}{'spam':>8}  {'spam caught':<25}{'cost':>8}"]
        for row in rows[:SHOWN]:
            ham, spam = f"{row['ham']:>8,}  {share(row['ham_blocked']):<23}", f"{row['spam']:>8,}  "
            value = row["value"] if len(row["value"]) < 20 else row["value"][:16] + "..."
            cost = "-" if row["cost"] is None else f"{row['cost']:.1f}"
            lines += [f"{value:<20}{ham}{spam}{share(row['spam_caught']):<25}{cost:>8}"]
        lines += [f"and {len(rows) - SHOWN:,} more, which --json prints"] if len(rows) > SHOWN else []
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate the saved model on the file that the command line names and print what was measured.

    Args:
        arguments: those of the command line if None.

    Returns:
        The exit status: 1, with a sentence on stderr, where the file or the model cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m operations.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="messages as .csv, .tsv or .txt (tabs), .jsonl or .json, or .parquet")
    parser.add_argument("--text", default="text", metavar="NAME", help="column of the texts (default: text)")
    parser.add_argument("--label", default="label", metavar="NAME", help="column of the labels (default: label)")
    parser.add_argument("--by", action="append", default=[], metavar="NAME", help="another column to compare by")
    parser.add_argument("--threshold", type=float, help="propensity to act from (default: that of the model's card)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    try:
        data = read_messages(args.file, args.text, args.label, args.by)
        measured = measure(data, args.text, args.label, args.by, args.threshold)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(measured, indent=2) if args.json else report(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
