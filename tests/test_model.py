"""How the saved model behaves: what must not change its answer, and what must."""

import pytest
from helpers import HAM, SPAM
from sklearn.base import BaseEstimator

from score import explain, load_card, load_model, score


@pytest.fixture(scope="module")
def model():
    """The saved model."""
    return load_model()


def log_odds(text: str, model: BaseEstimator) -> float:
    """Return the log-odds of spam."""
    return float(model.decision_function([text])[0])


def test_explanation_points_at_the_words(model):
    text = "hi mum, claim your FREE prize now"
    contributions = explain(text, model)
    prize = sum(contributions[text.index("FREE") : text.index(" now")])
    assert prize > sum(contributions[: text.index(",")])
    assert prize > 0


@pytest.mark.parametrize("name", ["Anna", "Priya", "John", "Mohammed", "Xiu", "Zbigniew"])
@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("Hi {}, are you coming home for dinner tonight?", False),
        ("{} said she will be late, so don't wait", False),
        ("Congratulations {}! You have won a £1000 prize. Call 09061701461 to claim", True),
    ],
)
def test_a_name_does_not_decide(model, text, name, prediction):
    assert score(text.format(name), model, load_card()["threshold"])[0] is prediction


@pytest.mark.parametrize("edit", [str.strip, lambda text: f"  {text} ", lambda text: text.replace(" ", "  ")])
@pytest.mark.parametrize("text", SPAM + HAM)
def test_spacing_does_not_decide(model, text, edit):
    threshold = load_card()["threshold"]
    assert score(edit(text), model, threshold)[0] == score(text, model, threshold)[0]


@pytest.mark.parametrize("number", ["09061701461", "08712300220", "09058094455"])
def test_which_number_does_not_decide(model, number):
    assert score(f"You have won a prize! Call {number} to claim", model, load_card()["threshold"])[0]


@pytest.mark.parametrize("addition", [" Call 09061701461 to claim", " FREE prize, txt WIN to 80086", " £1000 cash"])
@pytest.mark.parametrize("text", HAM)
def test_an_offer_pushes_towards_spam(model, text, addition):
    assert log_odds(text + addition, model) > log_odds(text, model) + 0.5


@pytest.mark.parametrize("addition", [" see you at home later", " sorry i'm late, ok?", " haha love you"])
@pytest.mark.parametrize("text", SPAM)
def test_small_talk_pushes_towards_ham(model, text, addition):
    assert log_odds(text + addition, model) < log_odds(text, model)
