"""The published references beside what is here, and the one that is being fetched: it goes on when nobody looks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lib_dpo.errors import BusyError, NotFoundError, SettingError
from lib_dpo.files.references.fetch import Fetched, Offer, ask, by_hand, check_room, fetch, kept_of, target_of
from lib_dpo.files.references.known import REFERENCES, Known, known
from lib_dpo.hosts.base import Host, Job
from lib_dpo.webui.jobs import Jobs, Record
from lib_dpo.webui.library import Library
from lib_dpo.webui.references.bases import BasesFound, right_bases

logger = logging.getLogger(__name__)

State = Literal["here", "begun", "can be fetched", "see its page"]


@dataclass(frozen=True)
class Row:
    """A reference and what is here of it. `kept`: bytes of an unfinished fetch."""

    reference: Known
    state: State
    kept: int


@dataclass(frozen=True)
class Bases:
    """The checkpoints that fit a reference as its base, the nearest first: names of the list, and the relative change."""

    fitting: tuple[tuple[str, float], ...]
    looked_at: int
    not_looked_into: tuple[str, ...]  # pickles, which would have to be loaded whole

    def as_json(self) -> list[dict[str, Any]]:
        return [{"name": name, "change": change} for name, change in self.fitting]


@dataclass
class Fetching:
    """The fetch that was started last. `fetched` and `bases` come when it is done; `seen`: whether a page has shown its end."""

    offer: Offer
    record: Record
    fetched: Fetched | None = None
    bases: Bases | None = None
    seen: bool = False


class References:
    """One host's references."""

    def __init__(self, host: Host, jobs: Jobs, library: Library) -> None:
        self._host, self._jobs, self._library = host, jobs, library
        self.last: Fetching | None = None
        self.nearest: dict[Path, str] = {}  # reference -> the base that was found for it last

    def rows(self) -> list[Row]:
        """The table. Opens no file."""
        return [self._row(reference) for reference in REFERENCES]

    def any_here(self) -> bool:
        """Whether there is a reference: a model in the reference folder, or one that says it is about DPO.

        Any whole checkpoint may be one, but the list of them says nothing.
        """
        own = self._host.reference_dir
        found = self._library.references()
        return any(own in entry.path.parents or "dpo" in entry.name.casefold() for entry in found)

    def by_hand(self, name: str) -> str:
        """Which file to put where, for a person without a network here."""
        reference = _named(name)
        return by_hand(reference, self.place(reference))

    def place(self, reference: Known) -> str:
        """Where a reference goes, for people."""
        target = target_of(reference, self._folder(reference))
        return "/".join(target.parts[-3:])

    def ask(self, name: str) -> Offer:
        """What the hub says now; nothing is fetched. Raises as `ask`, and OutputError where it could not be fetched anyway."""
        reference = _named(name)
        offer = ask(reference, self._folder(reference))
        check_room(offer)
        return offer

    def start(self, offer: Offer | None, name: str) -> Fetching:
        """Fetch what was offered, beside the host's work.

        Raises:
            SettingError: it was not asked for this reference. BusyError: another fetch is running.
        """
        if offer is None or offer.reference.name != name:
            raise SettingError(f"{name or 'no reference'} was not asked for yet; press Ask the hub first")
        if self.last and not self.last.record.is_over and not self.last.record.stop:
            raise BusyError(f"{self.last.offer.reference.name} is being fetched; wait for it, or cancel it")
        check_room(offer)
        record = self._jobs.register(f"Fetch {name}", beside=True)
        self.last = last = Fetching(offer, record)

        def work(job: Job) -> dict[str, Any]:
            fetched = fetch(offer, job.progress)
            last.bases = self._settled(offer, fetched)
            last.fetched = fetched
            found = {"file": fetched.path.name, "bytes": fetched.size, "sha256": fetched.sha256}
            return found | {"sha256_announced": fetched.announced, "bases": last.bases.as_json() if last.bases else []}

        self._jobs.go_on(record, work)
        return last

    def cancel(self) -> None:
        """Stop the fetch that is running, if any: what came of it is kept."""
        if self.last and not self.last.record.is_over:
            self._jobs.cancel(self.last.record.id)

    def bases(self, reference: Path, job: Job | None = None) -> Bases:
        """The checkpoints of the list that fit a reference as its base."""
        names = {entry.path: entry.name for entry in self._library.checkpoints() if entry.path != reference}
        found: BasesFound = right_bases(reference, list(names), on_progress=job.progress if job else None)
        return Bases(
            tuple((names[each.path], each.change) for each in found.fitting),
            found.looked_at,
            tuple(names[path] for path in found.pickles),
        )

    def nearest_base(self, reference: Path, job: Job | None = None) -> str:
        """The name of the checkpoint that fits a reference best as its base.

        Raises:
            NotFoundError: none of the list fits.
        """
        found = self.bases(reference, job)
        if not found.fitting:
            raise NotFoundError(
                f"none of the {found.looked_at} checkpoints that can be looked into is the base that {reference.name} was "
                "tuned from; put it, such as SD 1.5 or SDXL 1.0, into the folder of the checkpoints, or choose it by hand"
            )
        self.nearest[reference] = found.fitting[0][0]
        return self.nearest[reference]

    def _settled(self, offer: Offer, fetched: Fetched) -> Bases | None:
        """The base of a reference that has come; a LoRA goes into the host's list. The file stands, whatever is said of it."""
        try:
            if offer.reference.form == "unet":
                return self.bases(fetched.path)
            self._host.refresh()
        except Exception:
            logger.exception("%s is here, but could not be taken up", fetched.path)
        return None

    def _folder(self, reference: Known) -> Path:
        return self._host.lora_dir if reference.form == "lora" else self._host.reference_dir

    def _row(self, reference: Known) -> Row:
        folder = self._folder(reference)
        if target_of(reference, folder).exists():
            return Row(reference, "here", 0)
        kept = kept_of(reference, folder)
        if not reference.can_be_fetched:
            return Row(reference, "see its page", 0)
        return Row(reference, "begun" if kept else "can be fetched", kept)


def names() -> Sequence[str]:
    """Of all references."""
    return [reference.name for reference in REFERENCES]


def _named(name: str) -> Known:
    reference = known(name or "")
    if reference is None:
        raise NotFoundError(f"there is no published reference named {name!r}; choose one from the list")
    return reference
