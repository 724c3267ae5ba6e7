"""The messages of today: data/today.tsv is what its card, data/today.md, says."""

import csv

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics import roc_auc_score

KINDS = {
    *("delivery", "bank", "otp", "government", "travel", "utility", "telecom", "health", "school"),
    *("shop", "job", "family", "friend", "money", "leisure", "support", "community"),
}
COUNTRIES = {"UK", "IE", "US", "IN", "SG", "NG", "AU"}


@pytest.fixture(scope="module")
def today():
    """All messages of today."""
    return pd.read_csv(ROOT / "data/today.tsv", sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)


def test_columns_and_values(today):
    assert list(today) == ["label", "kind", "country", "writer", "text"]
    assert set(today["label"]) == {"ham", "spam"}
    assert set(today["kind"]) == KINDS
    assert set(today["country"]) == COUNTRIES
    assert today["text"].is_unique
    assert today["text"].str.len().between(10, 480).all()
    assert not today["text"].str.contains("[\\n\\r\\t]").any()


def test_card_states_the_numbers(today):
    card = (ROOT / "data/today.md").read_text(encoding="utf-8")
    assert f"{len(today):,} text messages" in card
    writers = sorted(today["writer"].unique())
    assert f"`{writers[0]}` to `{writers[-1]}`" in card
    assert len(writers) == int(writers[-1].removeprefix("w")) >= 6


def test_classes_kinds_and_countries_have_their_share(today):
    assert 0.48 < today["label"].eq("ham").mean() < 0.52
    assert len(today) >= 2400
    assert today.groupby(["kind", "label"]).size().min() >= 0.02 * len(today)
    assert today["country"].value_counts(normalize=True).min() > 0.05
    assert today.groupby("writer").size().min() > 300


def test_near_copies_are_few(today):
    digitless = today["text"].str.lower().str.replace(r"\d+", "0", regex=True)
    bags = TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 5)).fit_transform(digitless)
    near = (bags @ bags.T).tocoo()
    copies = near.col[(near.row < near.col) & (near.data > 0.6)]
    assert len(set(copies)) < 0.01 * len(today)


def test_form_alone_does_not_tell_the_classes_of_a_kind(today):
    form = pd.DataFrame(
        {
            "length": today["text"].str.len(),
            "digits": today["text"].str.count(r"\d"),
            "capitals": today["text"].str.count("[A-Z]"),
            "link": today["text"].str.contains(r"https?:|www\.|\w\.\w+/"),
        }
    )
    for kind, rows in today.groupby("kind").groups.items():
        spam = today.loc[rows, "label"] == "spam"
        for signal in form:
            auc = roc_auc_score(spam, form.loc[rows, signal])
            assert 0.25 < auc < 0.75, f"{signal} alone tells {kind} apart: AUC {auc:.2f}"


def test_no_single_word_tells_the_classes_of_a_kind(today):
    for kind, part in today.groupby("kind"):
        bags = CountVectorizer(binary=True, token_pattern=r"(?u)\w+|[^\w\s]").fit_transform(part["text"])
        spam = (part["label"] == "spam").to_numpy()
        difference = np.abs(bags[spam].mean(axis=0) - bags[~spam].mean(axis=0)).max()
        assert difference < 0.5, f"one word tells {kind} apart: AUC {0.5 + difference / 2:.2f}"


def test_disguised_spam_has_its_share(today):
    strange = (
        "(?i)[\u0370-\u04ff\u00ad\u200b-\u200f\u2060\ufeff\U0001d400-\U0001d7ff\uff00-\uffef]"
        r"|\b(?:\w[ .\-_]){3,}\w\b|\b[a-z]+[0134$@5][a-z]+\b"
    )
    disguised = today["text"].str.contains(strange).groupby(today["label"]).mean()
    assert 0.12 < disguised["spam"] < 0.25
    assert disguised["ham"] < disguised["spam"]


def test_british_mobile_numbers_are_of_the_range_for_fiction(today):
    numbers = today["text"].str.findall(r"(?<!\d)(?:\+44 ?|0)7\d{3} ?\d{3} ?\d{3}(?!\d)").explode().dropna()
    digits = numbers.str.replace(r"\D", "", regex=True).str.replace("^44", "0", regex=True)
    assert digits[~digits.str.startswith("07700900")].empty, digits.to_list()
