"""The data and the functions of prepare.ipynb that make it."""

import hashlib
import re
import runpy

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import ROOT

SPLITS = ("train", "validation", "test")
SOURCES = ("collection", "today")
REPAIR_SEED = 7


@pytest.fixture(scope="module")
def raw(prepare, prepared):
    """All labelled messages."""
    return prepare.load_data(prepared / "data/raw_data.csv")


@pytest.fixture(scope="module")
def data(prepare, raw):
    """The training data before it is split."""
    return prepare.prepare_training_data(raw, REPAIR_SEED)


@pytest.fixture(scope="module")
def splits(prepare, prepared):
    """The three splits as they lie in data/."""
    return {name: prepare.load_data(prepared / f"data/{name}.csv") for name in SPLITS}


@pytest.fixture(scope="module")
def of_collection(prepare, data):
    """The three splits of the collection alone."""
    return prepare.prepare_train_validation_test_split(data, 42, 0.15, 0.15)


@pytest.mark.parametrize("name", ["raw_data", *SPLITS, "repeated_splits"])
def test_file_is_the_version_that_is_checked_out(prepared, name):
    pointer = yaml.safe_load((prepared / f"data/{name}.csv.dvc").read_text(encoding="utf-8"))
    content = (prepared / f"data/{name}.csv").read_bytes()
    assert hashlib.md5(content).hexdigest() == pointer["outs"][0]["md5"]


def test_all_messages_are_read(prepare, raw):
    assert len(raw) == 5574
    assert raw["label"].value_counts().to_dict() == {"ham": 4827, "spam": 747}
    prepare.check(prepare.raw_schema, raw, "raw_data.csv")


def test_copies_are_dropped_and_labels_are_numbers(raw, data):
    assert len(raw) - len(data) == 403
    assert data["label"].value_counts().to_dict().keys() == {0, 1}
    assert data["text"].is_unique


def test_signs_and_blanks_are_repaired(raw, data):
    assert raw["text"].str.contains("&lt;#&gt;").sum() == 214
    assert not data["text"].str.contains("&lt;|&gt;|&amp;|<#>|<DECIMAL>|<TIME>|<URL>|<EMAIL>").any()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Ok &lt;#&gt; then", r"Ok \d{1,4} then"),
        ("meet at &lt;TIME&gt; &amp; eat", r"meet at \d{1,2}:\d\d & eat"),
        ("only &lt;DECIMAL&gt; left", r"only \d{1,3}\.\d\d left"),
        ("my number is &lt;#&gt;", r"my number is 07700900\d{3}"),
        ("in &lt;#&gt;  minutes", r"in [1-5]?\d  minutes"),
        ("mail &lt;EMAIL&gt; or &lt;URL&gt;", r"mail \S+@\S+ or \S+\.\S+"),
        ("nothing to do", "nothing to do"),
    ],
)
def test_repair(prepare, text, pattern):
    repaired = [prepare.repair(text, seed) for seed in range(20)]
    assert all(re.fullmatch(pattern, one) for one in repaired), repaired
    assert repaired == [prepare.repair(text, seed) for seed in range(20)]
    assert len(set(repaired)) > 1 or "&" not in text


def test_near_copies_are_of_one_group(prepare):
    campaign = "WINNER! Claim your {} prize now, call {} from a landline"
    texts = [
        campaign.format("£100", "09061701461"),
        campaign.format("£2500", "09058094455"),
        "See you at eight then, shall I bring the wine?",
        "Quite another offer, but call 09058094455",
        "Ok :)",
        "Ok :(",
    ]
    groups = prepare.find_groups(pd.DataFrame({"text": texts, "label": [1, 1, 0, 1, 0, 0]}))
    assert groups[0] == groups[1] == groups[3]
    assert len({groups[0], groups[2], groups[4]}) == 3


def test_contacts_join_spam_only(prepare):
    texts = ["Lovely weather today, ring 09058094455", "Buy gold cheaply from 09058094455"]
    groups = prepare.find_groups(pd.DataFrame({"text": texts, "label": [0, 1]}))
    assert groups[0] != groups[1]


def test_one_giant_group_is_refused(prepare):
    texts = [f"The same long message again and again, number {number}" for number in range(50)]
    with pytest.raises(ValueError, match="50 of 50 messages are one group"):
        prepare.find_groups(pd.DataFrame({"text": texts, "label": 1}))


def test_groups_of_the_collection(data):
    sizes = data.groupby("group")["label"].agg(["size", "max"])
    assert 4300 < len(sizes) < 4800
    assert sizes["size"].max() < 0.02 * len(data)
    assert 280 < (sizes["max"] == 1).sum() < 330


def test_splits_hold_everything_once(data, splits, prepare):
    together = pd.concat(splits.values())
    collection = together[together["source"] == "collection"]
    assert sorted(collection["text"]) == sorted(data["text"])
    today = prepare.load_data(ROOT / "data/today.tsv")
    assert sorted(together[together["source"] == "today"]["text"]) == sorted(today["text"])
    sizes = collection.groupby([*[collection["text"].isin(splits[name]["text"]) for name in SPLITS]]).size()
    assert sorted(sizes / len(data)) == pytest.approx([0.15, 0.15, 0.70], abs=0.02)


def test_no_group_or_writer_stands_in_two_splits(splits):
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(splits[one]["group"].astype(str)) & set(splits[other]["group"].astype(str))


def test_test_spam_has_no_near_copy_in_train(prepare, of_collection):
    spam = of_collection["test"][of_collection["test"]["label"] == 1]
    both = pd.concat([spam, of_collection["train"]], ignore_index=True)["text"]
    one, other, _ = prepare.similar_pairs(both, np.full(len(both), 0.6))
    assert not ((one < len(spam)) & (other >= len(spam))).any()


def test_splits_pass_the_checks(prepare, data, of_collection):
    prepare.check_splits(of_collection, data)


@pytest.mark.parametrize("seed", range(5))
def test_any_seed_passes_the_checks(prepare, data, seed):
    splits = prepare.prepare_train_validation_test_split(data, seed, 0.15, 0.15)
    prepare.check_splits(splits, data)
    again = prepare.prepare_train_validation_test_split(data, seed, 0.15, 0.15)
    assert all(splits[name].equals(again[name]) for name in SPLITS)


def test_another_seed_is_another_split(prepare, data):
    one, other = (prepare.prepare_train_validation_test_split(data, seed, 0.15, 0.15) for seed in (1, 2))
    assert set(one["test"]["text"]) != set(other["test"]["text"])


def test_leak_is_found(prepare, data, of_collection):
    stolen = of_collection["train"].head(1)
    leaking = {**of_collection, "test": pd.concat([of_collection["test"], stolen], ignore_index=True)}
    with pytest.raises(ValueError, match="train and test share 1 texts"):
        prepare.check_splits(leaking, data)


def test_near_copy_in_another_split_is_found(prepare, data, of_collection):
    near = of_collection["train"].head(1).assign(text="as good as the same")
    leaking = {**of_collection, "test": pd.concat([of_collection["test"], near], ignore_index=True)}
    with pytest.raises(ValueError, match="train and test share 1 near-copies, such as 'as good as"):
        prepare.check_splits(leaking, data)


def test_shifted_target_is_found(prepare, data, of_collection):
    shifted = {**of_collection, "validation": of_collection["validation"].query("label == 0")}
    with pytest.raises(ValueError, match="validation: share of spam is not between"):
        prepare.check_splits(shifted, data)


def test_shifted_lengths_are_found(prepare, data, of_collection):
    longer = of_collection["test"].assign(text=of_collection["test"]["text"] + " " + 30 * "x")
    with pytest.raises(ValueError, match="test: mean length is not between"):
        prepare.check_splits({**of_collection, "test": longer}, data)


def test_repeated_splits_keep_groups_together(prepared):
    table = pd.read_csv(prepared / "data/repeated_splits.csv", keep_default_na=False, dtype={"group": str})
    columns = [column for column in table if column.startswith("seed_")]
    assert len(columns) == 5
    for column in columns:
        for source in SOURCES:
            rows = table[table["source"] == source]
            assert set(rows[column]) == set(SPLITS)
            assert (rows.groupby("group")[column].nunique() == 1).all()


def test_a_writer_in_two_splits_is_refused(prepare, of_collection):
    today = prepare.load_data(ROOT / "data/today.tsv")
    broken = {**of_collection, "test": of_collection["test"].assign(group=of_collection["train"]["group"].iloc[0])}
    prepare.join_today.__globals__["params"] = {"split": {"validation_writers": 2, "test_writers": 3}}
    with pytest.raises(ValueError, match="stands in two splits"):
        prepare.join_today(broken, today, 1)


def test_scoring_data_is_left_as_it_is(prepare):
    texts = ["Free entry!", "", " ok "]
    assert prepare.prepare_scoring_data(texts) == texts
    assert prepare.prepare_scoring_data(pd.DataFrame({"text": texts})) == texts
    with pytest.raises(TypeError, match="message 2 is of type int"):
        prepare.prepare_scoring_data(["ok", 7])


BROKEN = {
    "a missing column": ("a.csv", b"label,message\nham,hello\n", "'text' is missing"),
    "a wrong encoding": (
        "a.csv",
        "label,text\nham,hello\nspam,£100\n".encode("latin-1"),
        "line 3: not UTF-8",
    ),
    "an empty file": ("a.csv", b"", "cannot be read"),
    "no messages": ("a.csv", b"label,text\n", "no messages"),
    "a label that is neither": (
        "a.csv",
        b"label,text\nham,hello\nmaybe,hi\n",
        "row 2, column 'label': 'maybe' is neither ham nor spam",
    ),
    "labels that are numbers": ("a.csv", b"label,text\n0,hello\n1,hi\n", "a.csv.*does not meet dtype"),
    "texts that are numbers": ("a.csv", b"label,text\nham,1\nmaybe,2\n", "row 2, column 'label'"),
    "a comma too many": ("a.csv", b"label,text\nham,hello,\nham,hi,\n", "more fields than columns"),
    "a blank text": ("a.csv", b'label,text\nham,"  "\n', "row 1, column 'text': '  ' is blank"),
    "a line without a tab": ("SMSSpamCollection", b"ham\thello\nspam win now\n", "row 2, column 'label'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(prepare, tmp_path, case):
    name, content, message = BROKEN[case]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare.check(prepare.raw_schema, prepare.load_data(file), name)
    assert name in str(caught.value)


def test_missing_file(prepare, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.csv cannot be read"):
        prepare.load_data(tmp_path / "nowhere.csv")


def test_quotation_marks_survive(prepare, tmp_path):
    messages = pd.DataFrame({"label": ["ham", "spam"], "text": ['He said "ok', 'a "b" c, d']})
    prepare.save_data(messages, tmp_path / "saved.csv")
    assert prepare.load_data(tmp_path / "saved.csv").equals(messages)
    assert [file.name for file in tmp_path.iterdir()] == ["saved.csv"]


def test_failed_save_leaves_the_old_file(prepare, tmp_path):
    class Broken(pd.DataFrame):
        def to_csv(self, **options):
            raise OSError("disk full")

    file = tmp_path / "data.csv"
    file.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        prepare.save_data(Broken(), file)
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_profile_says_in_words_what_moved(tmp_path, monkeypatch, capsys):
    messages = pd.DataFrame(
        {
            "label": ["ham"] * 300 + ["spam"] * 60,
            "text": [f"See you at home{'!' * (i % 9)}" for i in range(300)]
            + [f"Call 0906{i} now to claim £100" for i in range(60)],
        }
    )
    codes = pd.DataFrame({"label": "ham", "text": [f"Your code is {482000 + i}" for i in range(100)]})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    said = []
    for version in (messages, messages, pd.concat([messages, codes])):
        version.to_csv("data/raw_data.csv", index=False)
        runpy.run_path(str(ROOT / "data/profile_messages.py"), run_name="__main__")
        said.append(capsys.readouterr().out.splitlines())
    assert said[0] == ["No version before to compare with."]
    assert said[1] == [
        "There were 360 messages, and are 360.",
        "Neither the share of spam nor the means of the features moved.",
    ]
    assert said[2][0] == "There were 360 messages, and are 460."
    assert any(line.startswith("The mean of digits of ham went from 0.0 to 1.5 (p = ") for line in said[2])
    assert not any("of spam went" in line and "mean" in line for line in said[2])
