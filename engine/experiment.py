"""Who gets what in an experiment: an arm for each user, without a table of users."""

import hashlib
import math
from collections.abc import Callable, Mapping


def assign(user_id: str, experiment: str, shares: Mapping[str, float]) -> str:
    """Return the arm of a user in an experiment, the same one whenever it is asked.

    A hash of the experiment's name and the user gives the user a place between 0 and 1, and the arms lie there one
    after the other, each as wide as its share. So another experiment shuffles anew; when the first arm grows, nobody
    leaves it; and the users of an arm stay while its share and those before it stay.

    Args:
        user_id: who is to be assigned; in the case of this project the recipient.
        experiment: the name of the experiment, the salt of the hash.
        shares: from the name of each arm to its share of the users; they add up to 1.

    Raises:
        TypeError: the user or the experiment is not a string.
        ValueError: a share is no number from 0 to 1, or they do not add up to 1.

    Source: R. Kohavi, D. Tang and Y. Xu, Trustworthy Online Controlled Experiments, 2020, chapter 4.
    """
    if not isinstance(user_id, str):
        raise TypeError(f"user_id must be a string, not {user_id!r}")
    return assigner(experiment, shares)(user_id)


def assigner(experiment: str, shares: Mapping[str, float]) -> Callable[[str], str]:
    """Return a function that does for one user after the other what `assign` does, and checks the shares once.

    Args and Raises: as for `assign`.
    """
    if not isinstance(experiment, str):
        raise TypeError(f"experiment must be a string, not {experiment!r}")
    check_shares(shares)
    salt = hashlib.sha256(experiment.encode("utf-8", "surrogatepass")).digest()
    last = max(shares, key=shares.get)  # rounding may leave a sliver beyond the last arm

    def arm_of(user_id: str) -> str:
        place = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), key=salt, digest_size=8).digest()
        rest = int.from_bytes(place) / 2**64
        for arm, share in shares.items():
            if rest < share:
                return arm
            rest -= share
        return last

    return arm_of


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise ValueError if these are not the shares of arms, which lie from 0 to 1 and add up to 1."""
    for arm, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"the share of {arm!r} must be a number from 0 to 1, not {share!r}")
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-9):
        raise ValueError(f"the shares of the arms must add up to 1, not to {sum(shares.values()):g}")
