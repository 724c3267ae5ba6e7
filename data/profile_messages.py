"""Profile data/raw_data.csv: an HTML report, a few numbers, and in words what moved since the version before.

`dvc repro` runs it when the data has changed, and leaves the profile of the version before there to compare with.
`dvc metrics diff` shows what a commit of the data did to the numbers.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import ttest_ind_from_stats
from skrub import TableReport
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportions_ztest

BUILD = Path("build")
ALPHA = 0.01  # chance that anything is said to have moved when nothing has
COUNTED = {"digits": r"\d", "capitals": r"[A-Z]", "currency": r"[£$€]", "links": r"(?i)https?:|www\."}


def profile(messages: pd.DataFrame) -> dict[str, Any]:
    """Return how many messages there are of each label, and mean and standard deviation of their features.

    Args:
        messages: a table with `label` and `text`.
    """
    text = messages["text"]
    features = pd.DataFrame({"characters": text.str.len(), "words": text.str.split().str.len()})
    features = features.assign(**{name: text.str.count(pattern) for name, pattern in COUNTED.items()})
    by_label = features.groupby(messages["label"])
    return {
        "messages": len(messages),
        "labels": messages["label"].value_counts().to_dict(),
        "mean": by_label.mean().round(3).T.to_dict(),
        "deviation": by_label.std().round(3).T.to_dict(),
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Say what moved from one profile to another: Welch's tests of means and a z-test of the share of spam, with
    Holm's correction for their number. Messages that both versions have make the tests rather too careful.

    Args:
        before, after: as `profile` returns them.

    Returns:
        Sentences; one says so if nothing moved.
    """
    spam = [version["labels"].get("spam", 0) for version in (before, after)]
    total = [version["messages"] for version in (before, after)]
    shares = [count / number for count, number in zip(spam, total, strict=True)]
    said = [f"The share of spam went from {shares[0]:.1%} to {shares[1]:.1%}"]
    chances = [proportions_ztest(spam, total)[1]]
    for label in sorted(before["labels"].keys() & after["labels"].keys()):
        for feature in before["mean"][label]:
            figures = [
                (version["mean"][label][feature], version["deviation"][label][feature], version["labels"][label])
                for version in (before, after)
            ]
            said.append(f"The mean of {feature} of {label} went from {figures[0][0]:.1f} to {figures[1][0]:.1f}")
            chances.append(ttest_ind_from_stats(*figures[0], *figures[1], equal_var=False)[1])
    chances = pd.Series(chances).fillna(1)  # where nothing differs at all
    moved, corrected, *_ = multipletests(chances, ALPHA, method="holm")
    lines = [f"There were {total[0]:,} messages, and are {total[1]:,}."]
    lines += [f"{line} (p = {p:.2g})." for line, p, has in zip(said, corrected, moved, strict=True) if has]
    return lines if len(lines) > 1 else [*lines, "Neither the share of spam nor the means of the features moved."]


if __name__ == "__main__":
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "profile.json"
    messages = pd.read_csv("data/raw_data.csv", keep_default_na=False)
    before, after = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}, profile(messages)
    print(*(compare(before, after) if "deviation" in before else ["No version before to compare with."]), sep="\n")
    path.write_text(json.dumps(after, indent=2) + "\n", encoding="utf-8")
    TableReport(messages, title="SMS Spam Collection", verbose=0).write_html(BUILD / "profile.html")
