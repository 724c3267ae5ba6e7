"""The data and the functions of prepare.ipynb that make it."""

import hashlib

import pandas as pd
import pytest
import yaml

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def raw(prepare, prepared):
    """All labelled messages."""
    return prepare.load_data(prepared / "data/raw_data.csv")


@pytest.fixture(scope="module")
def data(prepare, raw):
    """The training data before it is split."""
    return prepare.prepare_training_data(raw)


@pytest.fixture(scope="module")
def splits(prepare, prepared):
    """The three splits as they lie in data/."""
    return {name: prepare.load_data(prepared / f"data/{name}.csv") for name in SPLITS}


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


def test_near_duplicates(prepare, raw):
    keys = prepare.normalise(raw["text"])
    assert keys.duplicated().sum() == 487
    same = prepare.normalise(pd.Series(["Win £100, call now!", "WIN £2500 - call  NOW", ":)", ":-("]))
    assert same[0] == same[1]
    assert same[2] != same[3]


def test_splits_hold_everything_once(data, splits):
    together = pd.concat(splits.values())
    assert sorted(together["text"]) == sorted(data["text"])
    sizes = pd.Series({name: len(split) for name, split in splits.items()}) / len(data)
    assert sizes.to_dict() == pytest.approx({"train": 0.70, "validation": 0.15, "test": 0.15}, abs=0.01)


def test_splits_pass_the_checks(prepare, data, splits):
    prepare.check_splits(splits, data)


@pytest.mark.parametrize("seed", range(5))
def test_any_seed_passes_the_checks(prepare, data, seed):
    splits = prepare.prepare_train_validation_test_split(data, seed, 0.15, 0.15)
    prepare.check_splits(splits, data)
    again = prepare.prepare_train_validation_test_split(data, seed, 0.15, 0.15)
    assert all(splits[name].equals(again[name]) for name in SPLITS)


def test_another_seed_is_another_split(prepare, data):
    one, other = (prepare.prepare_train_validation_test_split(data, seed, 0.15, 0.15) for seed in (1, 2))
    assert set(one["test"]["text"]) != set(other["test"]["text"])


def test_leak_is_found(prepare, data, splits):
    stolen = splits["train"].head(1)
    near = stolen.assign(text=stolen["text"].str.upper() + " 123")
    leaking = {**splits, "test": pd.concat([splits["test"], near], ignore_index=True)}
    with pytest.raises(ValueError, match="train and test share 1 text"):
        prepare.check_splits(leaking, data)


def test_shifted_target_is_found(prepare, data, splits):
    shifted = {**splits, "validation": splits["validation"].query("label == 0")}
    with pytest.raises(ValueError, match="validation: share of spam is not between"):
        prepare.check_splits(shifted, data)


def test_shifted_lengths_are_found(prepare, data, splits):
    longer = splits["test"].assign(text=splits["test"]["text"] + " " + 30 * "x")
    with pytest.raises(ValueError, match="test: mean length is not between"):
        prepare.check_splits({**splits, "test": longer}, data)


def test_repeated_splits_are_leak_free(prepare, prepared):
    table = pd.read_csv(prepared / "data/repeated_splits.csv", keep_default_na=False)
    keys = prepare.normalise(table["text"])
    columns = [column for column in table if column.startswith("seed_")]
    assert len(columns) == 5
    for column in columns:
        assert set(table[column]) == set(SPLITS)
        assert (table.groupby(keys)[column].nunique() == 1).all()


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
