"""A blind test: pairs of pictures of one prompt and seed, drawn ahead by the host while one votes, sides hidden until the vote.

One strength is held against the untouched model; of several, the untouched model among them, those meet whose pair tells most.
Votes are on the disk before the next pair is shown. The test lives as long as the WebUI; started again with the same offset it
goes on where the votes end.
"""

from __future__ import annotations

import io
import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_dpo.errors import BusyError, Cancelled, HostError, NoModelError, NotFoundError, SettingError
from lib_dpo.files.atomic import encodable
from lib_dpo.hosts.base import Host, Job, LoadedModel, Request
from lib_dpo.offsets.patch import Patch
from lib_dpo.pictures.votes import ballots
from lib_dpo.pictures.votes.ballots import SIDES, Answer, Side, Vote
from lib_dpo.settings import BUNDLED_BASE, BUNDLED_PROMPTS
from lib_dpo.webui.jobs import Jobs, Record

if TYPE_CHECKING:  # numpy is imported when it is needed: a WebUI starts without it
    from PIL.Image import Image as Picture

    from lib_dpo.pictures.votes.strengths import Curve
    from lib_dpo.pictures.votes.tally import Tally

TITLE = "Blind test"
AHEAD = 3  # pairs that are drawn before they are asked for
FOLDER = "dpo-votes"  # in the host's folder of pictures
MOST_STRENGTHS = 12  # beyond it, no strength is seen often enough
CHOICES = (*SIDES, "none", "skip")
_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # what a page shows; both pictures alike


@dataclass(frozen=True)
class Asked:
    """A pair that is drawn and waits for its vote. Nothing in `id` or in the files tells the sides apart."""

    id: str
    a: float
    b: float
    prompt: str
    seed: int
    side: Side  # where the picture of strength a stands
    jpeg: tuple[bytes, bytes]  # left, right
    png: tuple[bytes, bytes]


@dataclass(frozen=True)
class Figures:
    """What all votes on this offset in this model say, those of other sessions too."""

    tally: Tally
    curve: Curve | None  # where several strengths were asked
    problems: tuple[str, ...]  # lines and files that could not be read

    def as_json(self) -> dict[str, Any]:
        """What the API shows."""
        return {
            **self.tally.as_json(),
            "best_strength": self.curve and self.curve.as_json(),
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class _Test:
    """What is tested."""

    model: LoadedModel
    offset: str  # as it was asked for
    name: str  # as votes name it
    blocks: str
    strengths: tuple[float, ...]  # rising; 0 is among them
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    request: Request

    def subjects(self) -> Iterator[tuple[str, int]]:
        """Prompts and seeds without end: all prompts with the first seed, then with the next, then with those behind them."""
        more = itertools.chain(self.seeds, itertools.count(max(self.seeds) + 1))
        return ((prompt, seed) for seed in more for prompt in self.prompts)


class Blind:
    """The blind test of one host. One person votes at a time; what another page shows of it is the same pair."""

    def __init__(
        self, host: Host, jobs: Jobs, patch: Callable[[str, str, int | None], Patch], request: Callable[..., Request]
    ) -> None:
        """`patch` and `request` are the session's: an offset ready for the loaded model, and checked settings of pictures."""
        self._host, self._jobs, self._patch, self._request = host, jobs, patch, request
        self._test: _Test | None = None
        self._ready: deque[Asked] = deque()
        self._aside: set[tuple[str, int]] = set()  # could not be drawn
        self._drawing: Record | None = None
        self.last: Vote | None = None  # in this test, since the WebUI runs
        self._lock = threading.RLock()

    @property
    def folder(self) -> Path:
        """Where votes are kept. Files of other sessions and machines that lie there count too."""
        return self._host.output_dir / FOLDER

    @property
    def offset(self) -> str:
        """The offset that is tested, by the name it was asked for. Raises NotFoundError without a test."""
        return self._running().offset

    @property
    def blocks(self) -> str:
        """The block weights that it is tested with. Raises NotFoundError without a test."""
        return self._running().blocks

    @property
    def problem(self) -> str:
        """Why no more pairs are drawn; empty while they are."""
        record = self._drawing
        if record is None or record.state not in ("failed", "cancelled"):
            return ""
        if record.state == "cancelled":
            return "Drawing was interrupted; start again to go on"
        return f"{record.error}. Your votes are kept; start again to go on"

    # ---- what people do ----

    def start(
        self, job: Job, *, offset: str, strengths: str = "1", prompts: Sequence[str] = (), negative: str = "", seeds: str = "1",
        blocks: str = "", steps: int = 20, cfg_scale: float = 7.0, sampler: str = "", width: int = 0, height: int = 0,
    ) -> None:  # fmt: skip
        """Begin a test, or go on with it, and draw the first pair; the others follow while one votes.

        Args:
            prompts: without any, those that come with the project; for the bundled model those that it can draw.
            blocks, steps, ...: as `Session.compare`; a rank is no part of a vote, so there is none.

        Raises:
            SettingError, NotFoundError, MismatchError: settings or an offset that cannot be used.
            HostError: something is baked in, or the pipeline failed.
        """
        from lib_dpo.pictures.plan import parse_seeds, parse_strengths
        from lib_dpo.pictures.votes.prompts import shipped

        self._host.live.ready()
        request = self._request(negative, steps=steps, cfg_scale=cfg_scale, sampler=sampler, width=width, height=height)
        wanted = tuple(sorted({0.0, *parse_strengths(strengths)}))
        if len(wanted) == 1:
            raise SettingError("strength 0 is the untouched model itself; give another one, such as 1")
        if len(wanted) > MOST_STRENGTHS:
            raise SettingError(f"{len(wanted)} strengths are too many to vote on; give at most {MOST_STRENGTHS - 1} beside 0")
        own = tuple(dict.fromkeys(encodable(text) for line in prompts if (text := line.strip())))
        patch, model = self._patch(offset, blocks, None), self._host.live.loaded()
        if model is None:
            raise NoModelError("no checkpoint is loaded yet; choose one in the WebUI, make one picture, and try again")
        own = own or (BUNDLED_PROMPTS if model.path.name == BUNDLED_BASE else shipped())
        test = _Test(model, offset, patch.name, blocks.strip(), wanted, own, parse_seeds(seeds), request)
        self._check_model(test)
        with self._lock:
            if self._test is None or not self._same(self._test, test):
                self._test, self._ready, self._aside, self.last = test, deque(), set(), None
            if self.problem:
                self._drawing = None
        if not self._ready:
            self._draw(job, 1)
        self._fill()

    def current(self) -> Asked | None:
        """The pair that is voted on now; None while it is being drawn. Draws on. Raises NotFoundError without a test."""
        test = self._running()
        with self._lock:
            if not self.problem:
                self._fill()
            return self._ready[0] if self._ready and test is self._test else None

    def vote(self, pair: str, choice: str) -> Vote | None:
        """Write down a vote on the current pair, and go on to the next.

        Args:
            pair: its `id`. A second vote on the same pair changes nothing, and gives None.
            choice: one of CHOICES.

        Raises:
            NotFoundError: no test. SettingError: no such choice. OutputError: it cannot be written; the pair stays.
        """
        if choice not in CHOICES:
            raise SettingError(f"choice {choice[:40]!r} is unknown; expected one of {', '.join(CHOICES)}")
        test = self._running()
        with self._lock:
            if not self._ready or self._ready[0].id != pair:
                return None
            asked = self._ready[0]
            answer: Answer = (
                "none" if choice == "none" else "skip" if choice == "skip" else "a" if choice == asked.side else "b"
            )
            vote = Vote(
                ballots.now(), test.model.path.stem, test.name, test.blocks, asked.a, asked.b, asked.prompt, asked.seed,
                asked.side, answer,
            )  # fmt: skip
            ballots.add(ballots.file_for(self.folder, vote.model, vote.offset), vote)
            self._ready.popleft()
            self.last = vote
            self._fill()
        return vote

    def figures(self) -> Figures:
        """What the votes say now. Raises NotFoundError without a test."""
        from lib_dpo.pictures.votes.strengths import best_strength
        from lib_dpo.pictures.votes.tally import tally

        test, found = self._running(), ballots.read(self.folder)
        votes = self._votes_of(test, found)
        one = test.strengths[0] or test.strengths[1]
        if len(test.strengths) == 2:
            return Figures(tally(votes, one), None, found.problems)
        return Figures(tally(votes), best_strength(votes), found.problems)

    def export(self) -> str:
        """All votes on this offset in this model, as JSON lines. Raises NotFoundError without a test."""
        votes = self._votes_of(self._running(), ballots.read(self.folder))
        return "".join(f"{encodable(vote.as_line())}\n" for vote in votes)

    # ---- drawing ahead ----

    def _fill(self) -> None:
        """Have pairs drawn until AHEAD are ready; one job at a time."""
        with self._lock:
            if len(self._ready) >= AHEAD or (self._drawing and not self._drawing.is_over and not self._drawing.stop):
                return
            try:
                self._drawing = self._jobs.start(TITLE, lambda job: self._draw(job, AHEAD))
            except BusyError:  # a page is starting the test just now
                return

    def _draw(self, job: Job, count: int) -> None:
        """Draw pairs until so many are ready. Raises HostError where the model is another one by now."""
        test = self._running()
        self._host.live.ready()
        while len(self._ready) < count and self._test is test:
            patch = self._patch(test.offset, test.blocks, None)
            self._check_model(test)
            asked = self._next(test)
            job.cells(2)
            job.check()
            try:
                pair = self._make(test, patch, *asked)
                job.check()  # an interrupted sampler returns what it has: an unfinished picture
            except Cancelled:
                raise
            except Exception:
                self._aside.add(asked[2:4])
                raise
            with self._lock:
                if self._test is test:
                    self._ready.append(pair)

    def _next(self, test: _Test) -> tuple[float, float, str, int, Side]:
        """Strengths a and b, prompt, seed, and the side of a: of the pair to draw now."""
        from lib_dpo.pictures.votes.strengths import next_pair

        with self._lock:
            waiting = list(self._ready)
        votes = self._votes_of(test, ballots.read(self.folder))  # after that: a vote meanwhile is in one of both, or in both
        done = {(vote.prompt, vote.seed) for vote in votes if {vote.a, vote.b} <= set(test.strengths)}
        done |= {(pair.prompt, pair.seed) for pair in waiting} | self._aside
        prompt, seed = next(subject for subject in test.subjects() if subject not in done)
        a, b = next_pair(votes, test.strengths, [(pair.a, pair.b) for pair in waiting])
        a, b = (a, b) if a else (b, a)  # the untouched model is b
        return a, b, prompt, seed, secrets.choice(SIDES)

    def _make(self, test: _Test, patch: Patch, a: float, b: float, prompt: str, seed: int, side: Side) -> Asked:
        """Draw both pictures, the left one first."""
        request = replace(test.request, prompt=prompt, seed=seed)
        left, right = (a, b) if side == "left" else (b, a)
        images = [self._host.generate(request, patch, strength).image for strength in (left, right)]
        if images[0].size != images[1].size:
            raise HostError("the two pictures of a pair differ in size; switch off what changes the size")
        jpeg, png = (tuple(_encoded(image, options) for image in images) for options in (_JPEG, {"format": "PNG"}))
        return Asked(secrets.token_hex(8), a, b, prompt, seed, side, (jpeg[0], jpeg[1]), (png[0], png[1]))

    def _check_model(self, test: _Test) -> None:
        model, baked = self._host.live.loaded(), self._host.live.baked()
        if model is None or model.path != test.model.path:
            now = f"{model.path.stem} is loaded now" if model else "nothing is loaded now"
            raise HostError(f"the blind test is of {test.model.path.stem}, but {now}; load that checkpoint again")
        if baked:
            raise HostError(
                f"{baked.offset} is baked into {model.name}, so there is no untouched picture to compare with; undo it first"
            )

    def _running(self) -> _Test:
        if self._test is None:
            raise NotFoundError("no blind test is running; start one")
        return self._test

    def _same(self, old: _Test, new: _Test) -> bool:
        """Whether what is drawn of the old test fits the new one."""
        return replace(old, model=new.model) == new and old.model.path == new.model.path

    @staticmethod
    def _votes_of(test: _Test, found: ballots.Ballots) -> tuple[Vote, ...]:
        return found.of(test.model.path.stem, test.name, test.blocks)


def _encoded(image: Picture, options: dict[str, Any]) -> bytes:
    """The pixels alone: what a host writes into its pictures would tell which is which."""
    from PIL import Image

    data, rgb = io.BytesIO(), image.convert("RGB")
    plain = Image.frombytes("RGB", rgb.size, rgb.tobytes())
    plain.save(data, **options)
    return data.getvalue()
