"""Profile data/raw_data.csv: an HTML report to look at and a few numbers to compare across versions.

`dvc repro` runs it when the data has changed, `dvc metrics diff` shows what the change did.
"""

import json
from pathlib import Path

import pandas as pd
from skrub import TableReport

messages = pd.read_csv("data/raw_data.csv", keep_default_na=False)
profile = messages.assign(
    characters=messages["text"].str.len(),
    words=messages["text"].str.split().str.len(),
    digits=messages["text"].str.count(r"\d"),
    capitals=messages["text"].str.count(r"[A-Z]"),
    currency=messages["text"].str.count(r"[£$€]"),
    links=messages["text"].str.count(r"(?i)https?:|www\."),
)
means = profile.groupby("label").mean(numeric_only=True).round(3)

build = Path("build")
build.mkdir(exist_ok=True)
TableReport(profile, title="SMS Spam Collection", verbose=0).write_html(build / "profile.html")
metrics = {
    "messages": len(profile),
    "labels": profile["label"].value_counts().to_dict(),
    "mean": means.T.to_dict(),
}
(build / "profile.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
