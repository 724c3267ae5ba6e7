"""What the loop is for, told with requests to the running service: `make story`, beside `make operate`.

A thousand messages arrive: of today, by writers whom the filter has never met, and among them genuine notices that
paid text services owe their subscribers, in the wording of their trade. They look much like what the filter learned to
take down. Users complain, the complaints become labels, the labels a candidate, and the candidate is promoted while
users go on sending. Then it is seen what becomes of the notices of other services.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import requests
import yaml

from engine.experiment import assign
from operations.store import ROOT, STATE

NOTICE = "FreeMsg: You are subscribed to {} for £{}.50 per {} until you send STOP to {}. Help? 0808 157 0{}"
SERVICES = {
    "first": ("GoalFlash", "Puzzle Club", "Fell Weather", "StarLine", "Daily Lamp", "Quizline", "TideTimes"),
    "second": ("Kwiz King", "Surf Report", "Cricket Alert", "Horo Weekly", "Brainbox", "Ski & Snow", "Bedtime Tales"),
}
NOTICES = 40  # of the services of either group
MESSAGES, SPAM = 1000, 360  # that arrive, and how many of them are spam: there are too few of today for a fifth
BATCH = 100
REPORT = 0.1  # share of the spam delivered that somebody reports
LISTED = 200  # messages in the longest list that the service gives
PATIENCE = 900  # seconds for a job


class Service:
    """The operator's service, as its clients see it."""

    def __init__(self, url: str, token: str):
        """Talk to the service at an address, with the operator's token."""
        self.url, self.session = url, requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def call(self, method: str, path: str, **fields: Any) -> Any:
        """Return what a route answers, however often it must be asked while the service is busy.

        Raises:
            ValueError: it refuses.
        """
        while True:
            answer = self.session.request(method, self.url + path, json=fields or None, timeout=30)
            if answer.status_code not in (429, 503):
                break
            time.sleep(float(answer.headers["Retry-After"]))
        if not answer.ok:
            raise ValueError(f"{method} {path} is refused: {answer.json()['error']}")
        return answer.json()

    def do(self, path: str, **fields: Any) -> dict[str, Any]:
        """Give an order, wait for its job and return the job's result.

        Raises:
            ValueError: the job fails.
        """
        job = self.call("POST", path, **fields)
        job = wait_until(
            lambda: (now := self.call("GET", f"/jobs/{job['id']}"))["finished"] and now, f"job {job['id']}", PATIENCE
        )
        if job["state"] != "done":
            raise ValueError(f"job {job['id']}, {job['kind']}, has {job['state']}: {job['message']}")
        return job["result"]

    def score_all(self, texts: Iterable[str]) -> list[bool]:
        """Return whether each text is taken for spam."""
        texts = list(texts)
        parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        answers = [self.call("POST", "/score/batch", texts=part)["results"] for part in parts]
        return [result["prediction"] for results in answers for result in results]


class Traffic:
    """A user who sends one message after the other, and counts the answers."""

    def __init__(self, url: str, texts: list[str]):
        """Send texts over and over to the service at an address, as long as the context is not left."""
        self.url, self.texts = url, texts
        self.answered = self.lost = 0
        self.ended, self.thread = threading.Event(), threading.Thread(target=self._send)

    def __enter__(self) -> "Traffic":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.thread.join()

    def _send(self) -> None:
        with requests.Session() as session:
            while not self.ended.is_set():
                try:
                    text = self.texts[(self.answered + self.lost) % len(self.texts)]
                    session.post(f"{self.url}/score", json={"text": text}, timeout=10).raise_for_status()
                    self.answered += 1
                except requests.RequestException:
                    self.lost += 1


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait until a condition holds and return it.

    Raises:
        TimeoutError: it does not.
    """
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.5)
    return result


def read_messages(path: Path, params: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the messages that arrive first, in their order, and all test messages.

    Args:
        path: of the test data that prepare.ipynb made.
        params: of params.yaml.

    Returns:
        Two tables with `text` and `label`, 1 for spam; that of the messages that arrive also has `region` and
        `is_notice`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run make run first")
    random, regions = np.random.default_rng(0), params["impact"]["regions"]
    test = pd.read_csv(path, keep_default_na=False)
    today, notices = test[test["source"] == "today"], write_notices("first")
    counts = {1: SPAM, 0: MESSAGES - SPAM - len(notices)}
    parts = [today[today["label"] == label].sample(count, random_state=0) for label, count in counts.items()]
    parts.append(pd.DataFrame({"text": notices, "label": 0, "is_notice": True}))
    messages = pd.concat(parts, ignore_index=True)[["text", "label", "is_notice"]].sample(frac=1, random_state=0)
    shares = [region["share"] for region in regions.values()]
    messages["region"] = random.choice(list(regions), len(messages), p=shares)
    return messages.fillna({"is_notice": False}).reset_index(drop=True), test


def write_notices(services: str) -> list[str]:
    """Return NOTICES notices of the "first" or the "second" services, each with a price and numbers of its own."""
    random, names = np.random.default_rng(list(SERVICES).index(services)), SERVICES[services]
    return [
        NOTICE.format(
            names[i % len(names)],
            random.integers(1, 6),
            random.choice(["week", "month"]),
            random.integers(60_000, 90_000),
            random.integers(100, 1000),
        )
        for i in range(NOTICES)
    ]


def tell(url: str, token: str, path: Path, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Tell the story.

    Args:
        url: of the running service, which has a state of its own.
        token: of the operator.
        path: of the test data that prepare.ipynb made.
        say: is given the sentences.

    Returns:
        What was counted: "taken_down" and "notices_taken_down" (of the messages that arrived), "complaints",
        "evaluation", "candidate", "before" and "after" (notices of other services that are taken down), "answered"
        and "lost" (requests while the candidate was promoted).

    Raises:
        FileNotFoundError, ValueError, TimeoutError: something is missing, is refused, or does not come about.
    """
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    messages, test = read_messages(path, params)
    service, notices = Service(url, token), write_notices("second")
    told = receive(service, messages, params["operations"], say)
    told["complaints"] = complain(service, messages, say)
    told["evaluation"] = evaluate(service, say)
    told["before"] = sum(service.score_all(notices))
    told["candidate"] = train(service, test, params["operations"]["promotion"]["shadow_messages"], say)
    with Traffic(url, test["text"].tolist()) as traffic:
        service.do(f"/models/{told['candidate']['model']}/promote")
    told |= {"answered": traffic.answered, "lost": traffic.lost}
    say(f"It is promoted. Of {traffic.answered + traffic.lost:,} messages sent meanwhile, {traffic.lost} were lost.")
    told["after"] = sum(service.score_all(notices))
    say(
        f"Of {len(notices)} notices of other services, {told['before']} were taken down before, and {told['after']} "
        "are now. The button on the page rolls it back."
    )
    return told


def receive(
    service: Service, messages: pd.DataFrame, params: dict[str, Any], say: Callable[[str], Any]
) -> dict[str, int]:
    """Send the messages, and wait until they are stored and acted on; note `id` and whether each is `taken_down`."""
    names, taken_down = [], []
    for number, message in enumerate(messages.itertuples()):
        recipient = f"user {number}"
        fields = {"text": message.text, "sender": f"sender {number}", "recipient": recipient, "region": message.region}
        answer = service.call("POST", "/score", **fields)
        names.append(answer["id"])
        # Who is in the arm without a filter gets everything.
        taken_down.append(
            answer["prediction"] and assign(recipient, params["experiment"], params["shares"]) == "filtered"
        )
    messages["id"], messages["taken_down"] = names, taken_down
    expected = messages.loc[messages["taken_down"], "id"].tolist()

    def are_acted_on() -> bool:
        seen = {row["message"] for row in service.call("GET", f"/takedowns?limit={LISTED}")}
        return seen >= set(sorted(expected)[-LISTED:])

    wait_until(are_acted_on, "what is taken down to be seen in the store")
    wrong = messages["taken_down"] & (messages["label"] == 0)
    counts = {"taken_down": len(expected), "notices_taken_down": int((wrong & messages["is_notice"]).sum())}
    say(
        f"{len(messages):,} messages arrived, {int(messages['label'].sum())} of them spam. {len(expected)} were taken "
        f"down, {int(wrong.sum())} of which were genuine: {counts['notices_taken_down']} of the {NOTICES} notices of "
        f"paid text services, and {int(wrong.sum()) - counts['notices_taken_down']} others."
    )
    return counts


def complain(service: Service, messages: pd.DataFrame, say: Callable[[str], Any]) -> int:
    """Let users say what they missed, and what spam they got; return the number of complaints."""
    missed = messages[messages["taken_down"] & (messages["label"] == 0)]
    got = messages[~messages["taken_down"] & (messages["label"] == 1)].sample(frac=REPORT, random_state=0)
    for source, part in {"complaint": missed, "spam report": got}.items():
        for message in part.itertuples():
            service.call("POST", "/feedback", message=message.id, source=source, text=message.text)
    say(f"{len(missed)} users miss a message and complain, {len(got)} report spam.")
    return len(missed)


def evaluate(service: Service, say: Callable[[str], Any]) -> dict[str, Any]:
    """Evaluate what was decided so far."""
    result = service.do("/evaluate")
    missed, reported = result["reported"]["missed"], result["reported"]
    say(
        f"Evaluation: of {result['taken_down']} messages taken down, at least {missed['value']:.1%} were missed (95%: "
        f"{missed['low']:.1%} to {missed['high']:.1%}); that and the spam reported cost {reported['cost']:.0f} or "
        "more for 1,000 messages, where a spam let through costs 1."
    )
    return result


def train(service: Service, test: pd.DataFrame, enough: int, say: Callable[[str], Any]) -> dict[str, Any]:
    """Train a candidate, and send other messages until it has scored enough of them on the side."""
    say("Training on what came back, which takes some minutes.")
    candidate = service.do("/train")
    texts = test["text"].tolist()

    def has_scored_enough() -> bool:
        service.score_all(texts)
        [now] = [model for model in service.call("GET", "/models") if model["id"] == candidate["model"]]
        return now["shadow"]["messages"] >= enough and now["shadow"]

    shadow = wait_until(has_scored_enough, "the candidate to score messages on the side", PATIENCE)
    say(
        f"Candidate {candidate['model']} scored {shadow['messages']:,} other messages on the side, and would have "
        f"decided {shadow['changed']} of them otherwise."
    )
    return candidate


def main() -> None:
    """Tell the story of the service that runs on this machine."""
    try:
        token = (STATE / "token").read_text(encoding="utf-8").strip()
        _, port = (STATE / "server.pid").read_text(encoding="utf-8").split()
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is missing: run make operate in another terminal first")
    try:
        tell(f"http://127.0.0.1:{port}", token, ROOT / "data" / "test.csv")
    except (OSError, ValueError) as error:
        sys.exit(f"The story ends here: {error}")


if __name__ == "__main__":
    main()
