"""An operator's own file: what `python -m operations.evaluate` measures on it, and what it says of a bad one."""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import HAM, ROOT, SPAM, LengthModel, stub_card
from sklearn.metrics import average_precision_score

from operations import evaluate
from score import load_card, load_model, score_batch

SECRET = "meet me at the old mill"  # must never be printed
GOOD = f"text,label\n{SECRET},ham\n"


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Run the program as one would type it."""
    command = [sys.executable, "-m", "operations.evaluate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def text_of(length: int, mark: str = "x") -> str:
    """Return a text whose propensity is `length` percent for the stub."""
    return mark * length


# Ham of 10%, 20%, 30% and 80%, spam of 20% (missed), 60%, 70% and 90%: at 0.5 one of four ham is blocked, three of
# four spam are caught.
MESSAGES = [
    *((text_of(length), "ham", kind) for length, kind in ((10, "bank"), (20, "bank"), (30, "shop"), (80, "shop"))),
    *((text_of(length, "y"), "spam", kind) for length, kind in ((20, "bank"), (60, "bank"), (70, "shop"), (90, ""))),
]


@pytest.fixture
def stub(monkeypatch):
    """The stub in place of the saved model, and figures of the operator that can be reckoned by hand."""
    monkeypatch.setattr(evaluate, "load_model", LengthModel)
    monkeypatch.setattr(evaluate, "load_card", stub_card)


@pytest.fixture
def measured(stub, tmp_path, capsys, monkeypatch):
    """A function that evaluates rows of text, label and kind, and returns what --json prints."""
    params = tmp_path / "params.yaml"
    params.write_text("action: {ham_cost: 10, spam_share: 0.2}", encoding="utf-8")
    monkeypatch.setattr(evaluate, "PARAMS", params)

    def measure(rows, *options):
        file = tmp_path / "messages.csv"
        pd.DataFrame(rows, columns=["text", "label", "kind"]).to_csv(file, index=False)
        assert evaluate.main([str(file), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return measure


# Numbers


def test_shares_and_costs(measured):
    result = measured(MESSAGES)
    assert (result["messages"], result["ham"], result["spam"], result["threshold"]) == (8, 4, 4, 0.5)
    # Wilson's interval of 1 of 4, by its formula with z = 1.96
    assert result["ham_blocked"] == {
        "value": 0.25,
        "low": pytest.approx(0.04559, abs=1e-4),
        "high": pytest.approx(0.69936, abs=1e-4),
        "count": 1,
    }
    assert result["spam_caught"]["value"] == 0.75
    assert result["spam_caught"]["low"] == pytest.approx(1 - 0.69936, abs=1e-4)
    assert result["cost"]["value"] == pytest.approx(1000 * (10 + 1) / 8)
    assert 0 <= result["cost"]["low"] < result["cost"]["value"] < result["cost"]["high"] <= 10000
    # by falling propensity: spam, ham, spam, spam, ham, and then the ham and the spam of 20% together
    assert result["aucpr"]["value"] == pytest.approx((1 + 2 / 3 + 3 / 4 + 4 / 7) / 4)
    assert result["aucpr"]["low"] < result["aucpr"]["value"] < result["aucpr"]["high"] <= 1
    assert result["aucpr"]["chance"] == 0.5


def test_operators_share_of_spam(measured):
    at_share = measured(MESSAGES)["at_spam_share"]
    assert at_share["precision"]["value"] == pytest.approx(0.2 * 0.75 / (0.2 * 0.75 + 0.8 * 0.25))
    assert at_share["spam_delivered"]["value"] == pytest.approx(0.2 * 0.25 / (0.2 * 0.25 + 0.8 * 0.75))
    assert at_share["cost"]["value"] == pytest.approx(1000 * (10 * 0.8 * 0.25 + 0.2 * 0.25))
    low, high = 0.04559, 0.69936  # the bounds of ham blocked; those of spam caught are 1 less these
    worst = 0.2 * (1 - high) / (0.2 * (1 - high) + 0.8 * high)
    best = 0.2 * (1 - low) / (0.2 * (1 - low) + 0.8 * low)
    assert at_share["precision"]["low"] == pytest.approx(worst, abs=1e-3)
    assert at_share["precision"]["high"] == pytest.approx(best, abs=1e-3)
    assert at_share["cost"]["low"] == pytest.approx(1000 * (8 * low + 0.2 * low), rel=1e-3)
    assert all(figure["low"] < figure["value"] < figure["high"] for figure in at_share.values())


def test_figures_of_the_operator_are_those_of_params(stub, tmp_path, capsys):
    action = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["action"]
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    evaluate.main([str(tmp_path / "a.csv"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["ham_cost"], result["spam_share"]) == (action["ham_cost"], action["spam_share"])


@pytest.mark.parametrize(
    ("threshold", "blocked", "caught", "precision_known", "delivered_known"),
    [
        ("0", 1, 1, True, False),
        ("0.8", 0.25, 0.25, True, True),
        ("0.85", 0, 0.25, True, True),
        ("1", 0, 0, False, True),
    ],
)
def test_another_threshold(measured, threshold, blocked, caught, precision_known, delivered_known):
    result = measured(MESSAGES, "--threshold", threshold)
    assert (result["threshold"], result["ham_blocked"]["value"]) == (float(threshold), blocked)
    assert result["spam_caught"]["value"] == caught
    assert (result["at_spam_share"]["precision"] is not None) is precision_known
    assert (result["at_spam_share"]["spam_delivered"] is not None) is delivered_known


def test_bootstrap_is_that_of_scikit_learn_on_drawn_groups(monkeypatch):
    random = np.random.default_rng(1)
    labels, groups = random.integers(0, 2, 60), random.permutation(np.arange(60) // 2)
    propensities = np.round(random.random(60) * 0.5 + labels * 0.3, 1)  # with ties
    costs = random.random(60)
    monkeypatch.setattr(evaluate, "ROUNDS", 50)
    found = evaluate.bootstrap(labels, propensities, costs, groups)
    random, expected = np.random.default_rng(0), []
    for _ in range(50):
        at = np.concatenate([np.flatnonzero(groups == group) for group in random.integers(0, 30, 30)])
        expected.append((average_precision_score(labels[at], propensities[at]), 1000 * costs[at].mean()))
    assert found == pytest.approx(np.quantile(expected, [0.025, 0.975], axis=0).T)


@pytest.mark.filterwarnings("error")
def test_draws_without_spam_are_left_out(measured):
    aucpr = measured([*MESSAGES[:4], MESSAGES[-1]])["aucpr"]
    assert (aucpr["value"], aucpr["low"], aucpr["high"]) == (1, 1, 1)


def test_intervals_stay_the_same_and_narrow_with_more_messages(measured):
    few = measured(MESSAGES)
    assert measured(MESSAGES) == few
    many = measured([(text[:-1] + mark, *rest) for text, *rest in MESSAGES for mark in "abcdefghij"])
    for name in ("aucpr", "cost", "ham_blocked"):
        assert many[name]["value"] == pytest.approx(few[name]["value"])
        assert many[name]["high"] - many[name]["low"] < 0.6 * (few[name]["high"] - few[name]["low"])


def test_copies_are_counted_and_drawn_together(measured):
    few, copied = measured(MESSAGES), measured(MESSAGES * 10)
    assert (few["duplicates"], copied["duplicates"]) == (0, 72)
    assert "No text stands in the file twice." in few["notes"]
    assert any("72" in note for note in copied["notes"])
    for name in ("aucpr", "cost"):
        assert copied[name] == pytest.approx(few[name])


@pytest.mark.parametrize(
    ("rows", "note"),
    [([*MESSAGES[:3], *MESSAGES[4:]], "No ham is blocked"), ([*MESSAGES[:4], *MESSAGES[5:]], "No spam is missed")],
)
def test_a_bootstrap_of_no_errors_is_called_too_narrow(measured, rows, note):
    assert any(note in said for said in measured(rows)["notes"])
    assert not any(said.startswith("No ham") or said.startswith("No spam") for said in measured(MESSAGES)["notes"])


@pytest.mark.parametrize(
    ("rows", "known", "share", "other", "word"),
    [
        (MESSAGES[:4], "ham_blocked", 0.25, "spam_caught", "ham"),
        (MESSAGES[4:], "spam_caught", 0.75, "ham_blocked", "spam"),
    ],
)
def test_one_class(measured, rows, known, share, other, word):
    result = measured(rows)
    assert result[known]["value"] == share
    assert result[known]["low"] < share < result[known]["high"]
    assert [result[name] for name in (other, "aucpr", "cost", "at_spam_share")] == [None] * 4
    assert any(f"All messages are {word}" in note for note in result["notes"])


# Groups


def test_by_groups_worst_first(measured):
    rows = measured(MESSAGES)["by"]["kind"]
    assert [row["value"] for row in rows] == ["shop", "bank", "(empty)"]
    shop, bank, empty = rows
    assert (shop["messages"], shop["ham"], shop["spam"]) == (3, 2, 1)
    assert (shop["ham_blocked"]["value"], shop["spam_caught"]["value"]) == (0.5, 1)
    assert shop["cost"] == pytest.approx(1000 * 10 * 0.8 * 0.5)
    assert (bank["ham_blocked"]["value"], bank["spam_caught"]["value"]) == (0, 0.5)
    assert bank["cost"] == pytest.approx(1000 * 0.2 * 0.5)
    assert (empty["ham_blocked"], empty["cost"], empty["spam"]) == (None, None, 1)


def test_by_a_named_column(stub, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    lines = [
        {"text": "a", "label": False, "sender": 5, "source": "x\u001b[31m"},
        {"text": "b", "label": 0, "sender": None},
        {"text": "c", "label": "Ham"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert evaluate.main([str(file), "--json", "--by", "sender"]) == 0
    by = json.loads(capsys.readouterr().out)["by"]
    assert list(by) == ["source", "sender"]
    assert {row["value"]: row["messages"] for row in by["sender"]} == {"5": 1, "(empty)": 2}
    assert "x?[31m" in {row["value"] for row in by["source"]}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_many_values_are_cut_in_the_table_only(options, stub, tmp_path, capsys):
    rows = [{"text": f"a{i}", "label": "ham", "source": f"sender {i}"} for i in range(30)]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    assert evaluate.main([str(tmp_path / "a.csv"), *options]) == 0
    output = capsys.readouterr().out
    assert output.count("sender ") == (30 if options else 20)
    assert ("and 10 more" in output) is not bool(options)


# What is printed


def test_table(stub, tmp_path, capsys):
    rows = [(text, label, kind or "a kind with a very long name") for text, label, kind in MESSAGES]
    pd.DataFrame(rows, columns=["text", "label", "kind"]).to_csv(tmp_path / "a.csv", index=False)
    assert evaluate.main([str(tmp_path / "a.csv")]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 100
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "stub at the threshold 0.5" in lines
    assert {"messages 8", "ham 4", "spam 4"} <= set(lines)
    assert "ham blocked 25.00% 4.56% to 69.94% 1 of 4" in lines
    assert "spam caught 75.00% 30.06% to 95.44% 3 of 4" in lines
    assert any(line.startswith("AUCPR 0.747 ") and line.endswith("chance level 0.500") for line in lines)
    assert any(line.startswith("precision of what is taken down 42.86% ") for line in lines)
    assert any(line.startswith("spam among what is delivered 7.69% ") for line in lines)
    assert "shop 2 50.0% (9.5% to 90.5%) 1 100.0% (20.7% to 100.0%) 4000.0" in lines
    assert "a kind with a ve... 0 - 1 100.0% (20.7% to 100.0%) -" in lines


def test_long_notes_are_wrapped(stub, tmp_path, capsys):
    pd.DataFrame(MESSAGES * 2, columns=["text", "label", "kind"]).to_csv(tmp_path / "a.csv", index=False)
    assert evaluate.main([str(tmp_path / "a.csv")]) == 0
    output = capsys.readouterr().out
    assert "repeat the text of an earlier one: 8." in output
    assert max(map(len, output.splitlines())) <= 100


def test_table_of_one_class(stub, tmp_path, capsys):
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    assert evaluate.main([str(tmp_path / "a.csv")]) == 0
    output = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert {"AUCPR -", "spam caught -", "precision of what is taken down -"} <= set(lines)
    assert "ham blocked 0.00% 0.00% to 79.35% 0 of 1" in lines
    assert SECRET not in output


def test_saved_model_as_a_program(tmp_path):
    file = tmp_path / "a.csv"
    pd.DataFrame({"text": SPAM + HAM, "label": [1] * len(SPAM) + [0] * len(HAM)}).to_csv(file, index=False)
    done = run(str(file), "--json", "--threshold", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    result, card = json.loads(done.stdout), load_card()
    labels = [decision for decision, _ in score_batch(SPAM + HAM, load_model(), 0.5)]
    assert result["model"] == card["name"]
    assert result["spam_caught"]["count"] == sum(labels[: len(SPAM)])
    assert result["ham_blocked"]["count"] == sum(labels[len(SPAM) :])


# Files


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.csv", 'body,spam\n"a, ""b""\n c",TRUE\n\nd, 0 \n', {2: 'a, "b"\n c', 4: "d"}),
        ("a.csv", "\ufeffbody,spam\r\na,1\r\nd,False\r\n", {2: "a", 3: "d"}),
        ("a.tsv", 'spam\tbody\nspam\t"a\nHAM\td, "e"\n', {2: '"a', 3: 'd, "e"'}),
        ("a.txt", "body\tspam\nNA\tSpam\nd\tham", {2: "NA", 3: "d"}),
        ("a.jsonl", '{"body": "a\u2028b", "spam": true}\n\n{"spam": 0, "body": "d"}\n', {1: "a\u2028b", 3: "d"}),
        ("A.JSON", '{"body": "\\ud800", "spam": 1}\r\n{"spam": "False", "body": "d"}', {1: "\ud800", 2: "d"}),
    ],
)
def test_kinds_of_files(name, content, texts, stub, tmp_path, capsys):
    file = tmp_path / name
    file.write_bytes(content.encode())
    data = evaluate.read_messages(file, "body", "spam", [])
    assert data["body"].to_dict() == texts
    assert data["spam"].tolist() == [1, 0]
    assert evaluate.main([str(file), "--text", "body", "--label", "spam"]) == 0


def test_parquet(stub, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyarrow")
    file = tmp_path / "a.parquet"
    pd.DataFrame({"text": pd.Categorical(["a", "b"]), "label": [True, False]}).to_parquet(file)
    assert evaluate.main([str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spam"] == 1
    pd.DataFrame({"text": ["a", None], "label": [1, 0]}).to_parquet(file)
    assert evaluate.main([str(file)]) == 1
    assert "row 2: the text is blank" in capsys.readouterr().err
    file.write_bytes(b"no Parquet")
    assert evaluate.main([str(file)]) == 1
    assert "not Parquet" in capsys.readouterr().err

    for error, said in ((ImportError, "pyarrow, which is not installed"), (NotImplementedError, "not Parquet")):
        monkeypatch.setattr(pd, "read_parquet", Mock(side_effect=error))
        assert evaluate.main([str(file)]) == 1
        assert said in capsys.readouterr().err


BAD = {
    "missing file": ("a.csv", None, [], "No such file"),
    "unknown ending": ("a.xlsx", GOOD, [], "must end in"),
    "empty": ("a.csv", "", [], "no messages"),
    "only a header": ("a.csv", "text,label\n", [], "no messages"),
    "empty list": ("a.json", "[]", [], "row 1: each line must be a JSON object"),
    "not UTF-8": ("a.csv", GOOD.encode() + b"caf\xe9,ham\n", [], "line 3: this is not UTF-8"),
    "no label column": ("a.csv", f"text\n{SECRET}\n", [], "label of every message"),
    "no header": ("a.csv", f"{SECRET},ham\n{SECRET},ham\n", [], "one column 'text', or --text"),
    "no such column": ("a.csv", GOOD, ["--text", "body"], "'body', or --text"),
    "column twice": ("a.csv", "text,label,label\na,0,1\n", [], "one column 'label'"),
    "nothing to group by": ("a.csv", GOOD, ["--by", "sender"], "'sender', or --by"),
    "by text": ("a.csv", GOOD, ["--by", "text"], "cannot be"),
    "text as label": ("a.csv", GOOD, ["--label", "text"], "cannot be"),
    "bad label": ("a.csv", f"{GOOD}a,spam\n{SECRET},{SECRET}\n", [], "row 4: the label must be ham or spam"),
    "no label": ("a.csv", GOOD + "a,\n", [], "row 3: the label must be"),
    "blank text": ("a.csv", GOOD + ' ,ham\n" ",ham', [], "row 3: the text is blank"),
    "text is a number": (
        "a.jsonl",
        '{"text": "a", "label": 0}\n{"text": 5, "label": 0}',
        [],
        "row 2: the text is blank or not",
    ),
    "text is missing": ("a.jsonl", '{"text": "a", "label": 0}\n{"label": 0}', [], "row 2: the text is blank or not"),
    "long text": (
        "a.tsv",
        f"text\tlabel\n{'x' * 10_000}\tham\n{'y' * 10_001}\tham\n",
        [],
        "row 3: the text has 10,001",
    ),
    "a comma unquoted": ("a.csv", f"{GOOD}well, {SECRET},ham\n", [], "row 3: it must have as many fields"),
    "a field too few": ("a.csv", f"{GOOD}{SECRET}\n", [], "row 3: it must have as many fields"),
    "open quote": ("a.csv", f'{GOOD}"{SECRET},ham\n', [], "row 3: unexpected end of data"),
    "not JSON": ("a.jsonl", f'{{"text": "{SECRET}"', [], "row 1: each line must be a JSON object"),
    "not an object": ("a.jsonl", f'{{"text": "a", "label": 0}}\n["{SECRET}"]', [], "row 2: each line must be"),
    "deep": ("a.jsonl", "[" * 100_000, [], "row 1: each line must be"),
    "half a surrogate pair": ("a.jsonl", '{"\\ud800": 1, "text": "a", "label": 0}', [], "row 1: each line must be"),
    "threshold": ("a.csv", GOOD, ["--threshold", "1.5"], "between 0 and 1"),
    "threshold is no number": ("a.csv", GOOD, ["--threshold", "nan"], "between 0 and 1"),
}


@pytest.fixture
def bad(tmp_path, request):
    """The arguments of a case of BAD, whose file lies in a folder, and what must be said."""
    name, content, options, said = BAD[request.param]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [str(tmp_path / name), *options], said


@pytest.mark.parametrize("bad", BAD, indirect=True)
def test_bad_input(bad, stub, capsys):
    arguments, said = bad
    assert evaluate.main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert said in output.err
    assert output.err.count("\n") == 1
    assert SECRET not in output.err


# As a program: each takes two seconds for its imports, so only some of them.
@pytest.mark.parametrize("bad", ["missing file", "not UTF-8", "bad label"], indirect=True)
def test_bad_input_of_the_program(bad):
    arguments, said = bad
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_folder(tmp_path, capsys):
    (tmp_path / "a.csv").mkdir()
    assert evaluate.main([str(tmp_path / "a.csv")]) == 1
    assert "cannot be read: Is a directory" in capsys.readouterr().err


def test_model_that_cannot_be_loaded(tmp_path, capsys, monkeypatch):
    def broken():
        raise FileNotFoundError("the model is missing")

    monkeypatch.setattr(evaluate, "load_model", broken)
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    assert evaluate.main([str(tmp_path / "a.csv")]) == 1
    assert capsys.readouterr().err == "the model is missing\n"


def test_make_without_a_file():
    command = ["make", "--old-file=.venv/requirements.txt", "evaluate"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "FILE"))}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Name the file to evaluate on: make evaluate FILE=messages.csv\nmake: ")
