"""What the votes say so far, and when they have said enough.

The win rate is wins / (wins + losses), with the interval of Wilson (1927); votes for "no difference" stand beside it.

People look after every vote and stop when they like what they see, which makes ordinary tests lie. So the end is told by an
e-value: under "both are liked alike" each decided vote is a fair coin, and

    E = ∫ p^wins (1 - p)^losses dBeta(½, ½)(p) / (½)^(wins + losses) = B(wins + ½, losses + ½) / B(½, ½) · 2^(wins + losses)

is a martingale of mean 1 that starts at 1. By Ville's inequality (1939) it ever reaches 20 with a probability of at most
1 / 20, however often one looks. The mixture is that of Robbins (1970), the name from Grünwald, de Heide and Koolen (arXiv
1906.07801); Howard et al. (arXiv 1810.08240) tell of such bounds that hold at all times.

The other end is "no difference that matters": the Wilson interval lies within 10 points of ½. That one is a plain interval,
which takes 94 decided votes at least. By simulation (tests/test_votes.py), of tests that go on until one end is reached: at a
win rate of ½, 4 in 100 end with a difference that is not there; "no difference" is said in 14 of 100 at a rate of .6, which
is the margin itself, and in fewer than 1 of 100 at .65. Half of the tests have ended after 19 votes at .8, 48 at .7, 96 at .65.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lib_dpo.pictures.votes.ballots import Vote

ENOUGH = 20.0  # e-value at which a difference is real: 1 / 20 is the error
MARGIN = 0.1  # of a win rate, either side of one half: what is smaller does not matter
_Z = 1.959963984540054  # two-sided 95 %

Verdict = Literal["better", "worse", "no difference", "open"]


@dataclass(frozen=True)
class Tally:
    """Votes between pictures with the offset and without it. A win is a vote for the picture with it."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    skipped: int = 0
    opposite: bool = False  # of a negative strength: a win is one of the opposite of DPO

    @property
    def decided(self) -> int:
        """Votes that prefer one picture."""
        return self.wins + self.losses

    @property
    def votes(self) -> int:
        """Votes that say something: skipped ones do not."""
        return self.decided + self.ties

    @property
    def win_rate(self) -> float | None:
        """wins / (wins + losses); None without such votes."""
        return self.wins / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float]:
        """Of the win rate, 95 %."""
        return wilson(self.wins, self.decided)

    @property
    def e_value(self) -> float:
        """Evidence against "both are liked alike"; see the module."""
        return math.exp(min(log_e_value(self.wins, self.losses), 690.0))  # JSON and floats know no more

    @property
    def verdict(self) -> Verdict:
        """What is known now; `open` until one of the ends is reached."""
        if log_e_value(self.wins, self.losses) >= math.log(ENOUGH):
            return "better" if self.wins > self.losses else "worse"
        low, high = self.interval
        return "no difference" if self.decided and low >= 0.5 - MARGIN and high <= 0.5 + MARGIN else "open"

    @property
    def text(self) -> str:
        """The figures in a sentence or two."""
        if not self.votes:
            return "No votes yet."
        return _SENTENCES[self.verdict](self) + self._ties()

    def as_json(self) -> dict[str, Any]:
        """What the API shows."""
        return {
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "skipped": self.skipped,
            "win_rate": self.win_rate,
            "interval": list(self.interval),
            "e_value": self.e_value,
            "verdict": self.verdict,
            "text": self.text,
        }

    def _ties(self) -> str:
        if not self.ties:
            return ""
        return f" In {self.ties} of all {self.votes} votes no difference was seen."


def tally(votes: Iterable[Vote], strength: float | None = None) -> Tally:
    """Count the votes against the untouched model; pairs of two strengths are no part of it.

    Args:
        strength: of the pictures with the offset; None for all above 0, for those below are of the opposite.
    """
    counts = {"wins": 0, "losses": 0, "ties": 0, "skipped": 0}
    for vote in votes:
        if (vote.a == 0) == (vote.b == 0):
            continue
        with_it = vote.a or vote.b
        if with_it != strength if strength is not None else with_it < 0:
            continue
        liked = {"a": vote.a, "b": vote.b}.get(vote.answer)
        counts["ties" if vote.answer == "none" else "skipped" if liked is None else "wins" if liked else "losses"] += 1
    return Tally(**counts, opposite=strength is not None and strength < 0)


def wilson(wins: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); 0 to 1 where n is 0."""
    if not n:
        return 0.0, 1.0
    share = wins / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # at 0 and 1 rounding goes beyond


def log_e_value(wins: int, losses: int) -> float:
    """Natural logarithm of the e-value of so many wins and losses against a fair coin; 0 without votes."""
    n = wins + losses
    beta = math.lgamma(wins + 0.5) + math.lgamma(losses + 0.5) - math.lgamma(n + 1)
    return beta - math.log(math.pi) + n * math.log(2)  # B(½, ½) = π


def _better(found: Tally) -> str:
    return _begun(f"{_who(found)} wins {found.wins} of {found.decided} on your model: real. {_rate(found)}")


def _worse(found: Tally) -> str:
    return _begun(f"{_who(found)} loses {found.losses} of {found.decided} on your model: real. {_rate(found)}")


def _alike(found: Tally) -> str:
    low, high = found.interval
    most = math.ceil(100 * max(high - 0.5, 0.5 - low) - 1e-9)
    return f"No difference after {found.decided} votes that matters: at most {most} points from one half. {_rate(found)}"


def _open(found: Tally) -> str:
    if not found.decided:
        return "Not decided yet: no vote prefers a picture."
    return f"Not decided yet: {_who(found)} wins {found.wins} of {found.decided}. {_rate(found)} Go on voting."


def _who(found: Tally) -> str:
    return "the opposite of DPO" if found.opposite else "DPO"


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _rate(found: Tally) -> str:
    low, high = found.interval
    return f"Win rate {100 * found.wins / found.decided:.0f} % (95 % interval {100 * low:.0f} to {100 * high:.0f} %)."


_SENTENCES = {"better": _better, "worse": _worse, "no difference": _alike, "open": _open}
