"""How the saved model behaves: what must not change its answer, and what must."""

import html
import re

import pytest
from helpers import HAM, SPAM
from sklearn.base import BaseEstimator

from score import explain, load_card, load_model, score

# Written for these tests, none of them is in the data. Numbers are of ranges set aside for fiction or masked.
GENUINE = {
    "otp": [
        "482913 is your verification code. Do not share it with anyone. It expires in 10 minutes.",
        "Your one-time password for signing in is 719204. Our staff will never ask you for it.",
        "OTP for your purchase of Rs 1,249.00 at BigBasket with card ending 4417 is 603158. Valid for 5 "
        "minutes. Do not share it with anyone. HDFC Bank",
        "Use 55081 to reset your password. If you did not ask for this, you can ignore this message.",
    ],
    "bank": [
        "Rs.2,500.00 debited from A/c XX4821 on 14-03-25 to VPA ramesh@okaxis. UPI Ref 507312345678. Not "
        "you? Call the number on your card.",
        "Acct: 012****789 Amt: NGN15,000.00 CR Desc: TRF FROM ADEBAYO O. Date: 12-May-25 Avail Bal: NGN48,210.55",
        "You've spent £42.10 at Tesco with your card ending 3318. Your balance is £611.75.",
        "Wells Fargo: A direct deposit of $2,184.50 posted to your account ending 6621 on 05/30.",
        "Did you attempt a purchase of $64.12 at SHELL with your card ending in 7702? Reply YES or NO. Bank of America",
    ],
    "delivery": [
        "Your parcel will arrive today between 11:20 and 12:20. Your driver is Stefan.",
        "We tried to deliver your parcel but you were out. It is at the Post Office on Mill Road until 22 "
        "June, please bring photo ID.",
        "Your order from John Lewis has been dispatched and should be with you on Thursday.",
        "Amazon: Your package was delivered. It was left at the front door.",
    ],
    "appointment": [
        "Reminder: you have an appointment at Elm Street Surgery on Tue 4 March at 10:40. If you cannot "
        "attend, please call 01632 960112.",
        "Hi Sarah, this is Bright Smile Dental confirming your cleaning on Friday at 2:30 pm. Reply C to "
        "confirm or call 555-0142.",
        "Your blood test results are back and they are normal. No further action is needed. Elm Street Surgery",
        "Your car is booked in for its MOT on Monday at 8:30. Please bring the locking wheel nut key. Station Garage",
    ],
}
SMISHING = {
    "parcel fee": [
        "Royal Mail: your parcel is being held because of an unpaid shipping fee of £1.99. Pay now at "
        "royalmail-redelivery-fee.com or it will be returned to sender.",
        "Evri: we could not deliver your package. Reschedule and pay the £1.45 redelivery fee: evri-parcel-rebook.info",
        "USPS: Your package cannot be delivered because of an incomplete address. Confirm your details "
        "within 24 hours: usps-address-check.top",
    ],
    "toll": [
        "E-ZPass: You have an unpaid toll of $6.99. Pay before tomorrow to avoid a late fee of $50: ezpass-tollpay.xyz",
        "FasTrak final notice: your vehicle has an outstanding toll balance. Settle it today or your licence "
        "will be suspended. fastrak-bill.cc/pay",
    ],
    "tax refund": [
        "HMRC: You are due a tax refund of £412.60. Claim it here before it expires: hmrc-refund-claim.co",
        "Dear taxpayer, your income tax refund of Rs 15,490 has been approved. Verify your account number to "
        "receive it: incometax-refund-in.com",
    ],
    "bank lock": [
        "HSBC: A new payee was added to your account. If this was NOT you, cancel it now at hsbc-secure-cancel.com",
        "Dear customer, your SBI account will be blocked today. Please update your KYC immediately at "
        "sbi-kyc-update.in",
        "Chase Alert: Your account has been locked because of unusual activity. Verify your identity at "
        "chase-unlock-secure.com",
    ],
    "hi mum": [
        "Hi Mum, I dropped my phone down the toilet and this is my new number. Text me on WhatsApp 07700 "
        "900482 as soon as you can xx",
        "Mum it's me, my phone broke. I need to pay a bill today and can't get into my bank. Can you send "
        "£850 and I'll pay you back tomorrow? x",
        "Hi Dad, my phone is broken so I am using a friend's. Save this number and message me on WhatsApp please",
    ],
    "task job": [
        "Hello, I am Lucy from HR. We have a remote part-time job: earn $200-$500 a day by rating products, "
        "60 minutes a day. Add me on WhatsApp +1 555 0134",
        "Earn Rs 3000 to 8000 daily from home by liking YouTube videos. No experience needed. Message on "
        "Telegram @easytask_hr",
        "We saw your CV online. Work from home, flexible hours, £180 a day, no experience needed. "
        "Interested? Reply YES for details",
    ],
}


def each(kinds: dict[str, list[str]]) -> list:
    """Return every text as a parameter that is called by its kind."""
    return [pytest.param(text, id=f"{kind} {i}") for kind, texts in kinds.items() for i, text in enumerate(texts, 1)]


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


@pytest.mark.parametrize("text", each(GENUINE))
def test_a_genuine_message_of_today_is_not_taken_down(model, text):
    assert not score(text, model, load_card()["threshold"])[0]


@pytest.mark.parametrize("text", each(SMISHING))
def test_plain_smishing_is_taken_down(model, text):
    assert score(text, model, load_card()["threshold"])[0]


@pytest.mark.parametrize("text", ["", " ", "\n", "\u200b", "?", "...", "asdfgh qwerty", "xkcd zzyzx", "1 2 3", "😀😀"])
def test_nothing_and_nonsense_are_ham(model, text):
    assert not score(text, model, load_card()["threshold"])[0]


def entities(text: str) -> str:
    """Write every character but letters, digits and spaces as an HTML entity."""
    return re.sub(r"[^\w\s]", lambda match: f"&#{ord(match[0])};", text)


def full_width(text: str) -> str:
    """Write every character of ASCII in its full-width form."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def bold(text: str) -> str:
    """Write every letter of English as the bold one of mathematics."""
    letters = {ord("a") + i: 0x1D41A + i for i in range(26)} | {ord("A") + i: 0x1D400 + i for i in range(26)}
    return text.translate(letters)


def cut_up(text: str) -> str:
    """Put an invisible character between any two letters of a word, of several kinds in turn."""
    signs = iter("\u200b\u200c\u200d\u2060\ufeff\u00ad" * len(text))
    return re.sub(r"(?<=\w)(?=\w)", lambda _: next(signs), text)


DISGUISES = [html.escape, entities, full_width, bold, cut_up, str.upper]


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("text", [*SPAM, *HAM, *each(GENUINE), *each(SMISHING)])
def test_a_disguise_changes_nothing(model, text, disguise):
    threshold = load_card()["threshold"]
    prediction, propensity = score(text, model, threshold)
    again = score(disguise(text), model, threshold)
    assert again[0] is prediction
    assert again[1] == pytest.approx(propensity, abs=1e-9)


def test_disguises_disguise():
    disguised = [disguise("Free & £5") for disguise in DISGUISES]
    assert len({"Free & £5", *disguised}) == 1 + len(DISGUISES)


# The publisher of the collection put these where numbers had been, in ham alone, and some one-time passwords of today
# begin with the mark. A model that takes it for a sign of ham lets any spam through that ends in a few of them.
ARTEFACT = " &lt;#&gt;"


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("text", [*SPAM, *each(SMISHING)])
def test_the_artefact_hides_nothing(model, text, times):
    threshold = load_card()["threshold"]
    prediction, propensity = score(text, model, threshold)
    again = score(text + times * ARTEFACT, model, threshold)
    assert again[0] is prediction
    assert again[1] == pytest.approx(propensity, abs=1e-9)
