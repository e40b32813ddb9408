"""One file of a published reference, from the hub to its place: asked for, resumable, checked, never over another file."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from lib_dpo.errors import BadFileError, BusyError, Cancelled, OutputError
from lib_dpo.files.atomic import check_output, explained, megabytes, rename_to_new
from lib_dpo.files.checkpoint import choose_weights
from lib_dpo.files.header import read_header
from lib_dpo.files.hub import UnreachableError, hub_explained, library, weights_among, without_telemetry
from lib_dpo.files.references.known import NOT_KNOWN, UNET_FILE, Known
from lib_dpo.progress import Progress

FREE_BESIDE = 500_000_000  # bytes that stay free on the disk
_PIECE = 1 << 20  # bytes between two looks at Cancel
_CHECK_SHARE = 20  # reading a file again takes about a twentieth of fetching it
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Offer:
    """What a fetch would do, as the hub says now: what people agree to.

    Attributes:
        file: in the repository. target: what it will be here. size: in bytes.
        sha256: as the hub announces it; empty where it does not.
        licence: as its page says now, or else as it was known.
        commit: of the repository. tag: by which what is kept of an unfinished fetch is recognised.
    """

    reference: Known
    file: str
    target: Path
    size: int
    sha256: str
    licence: str
    commit: str
    tag: str

    @property
    def part(self) -> Path:
        """Where the bytes lie until all of them are there and right."""
        return _part_of(self.target, self.tag)

    @property
    def kept(self) -> int:
        """How many bytes are here from a fetch before."""
        return _size(self.part)

    @property
    def missing(self) -> int:
        """How many bytes have to come."""
        return self.size - self.kept


@dataclass(frozen=True)
class Fetched:
    """A file that is here. `announced`: whether the hub had announced this SHA-256."""

    path: Path
    size: int
    sha256: str
    announced: bool


def target_of(reference: Known, folder: Path) -> Path:
    """What the file of a reference is called in a folder."""
    return folder / f"{reference.name}.safetensors"


def kept_of(reference: Known, folder: Path) -> int:
    """How many bytes of a reference an unfinished fetch has left in a folder."""
    target = target_of(reference, folder)
    try:
        return max((_size(path) for path in folder.iterdir() if _is_part(path, target)), default=0)
    except OSError:  # there is no such folder yet
        return 0


def by_hand(reference: Known, place: str) -> str:
    """What to put where without a network here. `place` is the name of the target for people."""
    what = {"unet": reference.file or f"the .safetensors file of its UNet, such as {UNET_FILE}"}.get(
        reference.form, "the .safetensors file"
    )
    return f"With another machine or a browser: get {what} from {reference.page}, and save it as {place}"


def ask(reference: Known, folder: Path) -> Offer:
    """Ask the hub for size, licence and hash of a reference that would go into a folder. Nothing is written.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        UnreachableError: no network, or no hub at HF_ENDPOINT.
        BadFileError: the repository is not there, closed, or holds no single file that can be used.
    """
    if not reference.can_be_fetched:
        raise BadFileError(f"{reference.name}: is published as two models, expected a single one; see {reference.page}")
    hub = library("a fetch needs")
    with without_telemetry(hub), hub_explained(hub, reference.repo):
        info = hub.HfApi(endpoint=hub.constants.ENDPOINT).model_info(reference.repo)
        file = reference.file or _only_file(reference, {each.rfilename for each in info.siblings or ()})
        found = _announced(hub, reference.repo, file, info.sha or "main")
    if found.size is None:
        raise UnreachableError(f"{reference.repo}: does not say how large {file} is, expected a size; get it from its page")
    tag = hashlib.sha256(str(found.etag or f"{info.sha} {file}").encode()).hexdigest()[:12]
    sha256 = found.etag if found.etag and _SHA256.fullmatch(found.etag) else ""
    licence = next((each[len("license:") :] for each in info.tags or () if each.startswith("license:")), "")
    licence = licence or reference.licence or NOT_KNOWN
    return Offer(reference, file, target_of(reference, folder), found.size, sha256, licence, info.sha or "main", tag)


def check_room(offer: Offer) -> None:
    """Refuse a fetch that could not end well: a file of that name, a folder that is closed, too little space. OutputError."""
    if os.path.lexists(offer.target):
        raise OutputError(f"{offer.target}: exists already, and is not replaced; move it away to fetch it again")
    check_output(offer.target, overwrite=False)
    folder = next(parent for parent in offer.target.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < offer.missing + FREE_BESIDE:
        raise OutputError(
            f"{offer.target}: needs {megabytes(offer.missing)} and {megabytes(FREE_BESIDE)} to spare, {megabytes(free)} are "
            "free; free some space"
        )


def fetch(offer: Offer, on_progress: Progress) -> Fetched:
    """Get the bytes that are missing, check all of them, and give the file its name.

    What came stays beside the target when the connection is lost or the work is cancelled, and is not asked for again.

    Args:
        on_progress: may raise Cancelled, after every megabyte.

    Raises:
        OutputError: as `check_room`, before anything is asked for; or the disk is full.
        UnreachableError: the connection was lost; what came is kept.
        BadFileError: what came is not what the hub announced: nothing of it is kept.
        Cancelled: what came is kept.
    """
    check_room(offer)
    on_progress(offer.kept, _steps(offer), offer.file)  # before anything is asked for: what is here took no time
    with explained(offer.target):
        offer.target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(offer):
        _remove_other_parts(offer)
        try:
            if offer.kept < offer.size:
                _get(offer, on_progress)
            digest = _checked(offer, on_progress)
        except UnreachableError as error:
            raise UnreachableError(f"{error}. {_kept_words(offer)}") from error
        except Cancelled as error:
            raise Cancelled(f"{offer.reference.name}: stopped. {_kept_words(offer)}") from error
        finally:
            if not offer.kept:
                offer.part.unlink(missing_ok=True)
        with explained(offer.target):
            rename_to_new(offer.part, offer.target)
    return Fetched(offer.target, offer.size, digest, announced=bool(offer.sha256))


def _steps(offer: Offer) -> int:
    """What progress counts up to: every byte comes once, and is read once."""
    return offer.size + offer.size // _CHECK_SHARE + 1


def _kept_words(offer: Offer) -> str:
    if not offer.kept:
        return "Nothing of it is here"
    return f"{megabytes(offer.kept)} of {megabytes(offer.size)} are kept, and the next fetch goes on from there"


def _only_file(reference: Known, names: set[str]) -> str:
    """The one file of a repository that is the reference. Raises BadFileError where there is none, or more."""
    if reference.form == "unet":
        inside = {name.partition("/")[2] for name in names if name.startswith("unet/")}
        index, weights = choose_weights(inside)
        found = [f"unet/{name}" for name in weights] if not index else []
        if not inside:  # the repository is the UNet itself
            index, weights = choose_weights({name for name in names if "/" not in name})
            found = [] if index else list(weights)
    else:
        found = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    raise BadFileError(
        f"{reference.repo}: has no single .safetensors file of {reference.name}, found {weights_among(names)}; see "
        f"{reference.page}"
    )


def _announced(hub: Any, repo: str, file: str, commit: str) -> Any:
    """What the hub says of a file: etag, size, location."""
    url = hub.hf_hub_url(repo, file, revision=commit, endpoint=hub.constants.ENDPOINT)
    return hub.get_hf_file_metadata(url)


def _get(offer: Offer, on_progress: Progress) -> None:
    """Append the missing bytes to the part."""
    hub = library("a fetch needs")
    from huggingface_hub import file_download  # its own loop asks again, from where it was, when a connection is lost

    total = _steps(offer)
    with without_telemetry(hub), hub_explained(hub, offer.reference.repo), _small_pieces(hub, file_download):
        found = _announced(hub, offer.reference.repo, offer.file, offer.commit)
        headers = hub.utils.build_hf_headers()
        if urlsplit(found.location).netloc != urlsplit(hub.constants.ENDPOINT).netloc:
            headers.pop("authorization", None)  # a log-in is for the hub, not for where its files lie
        with explained(offer.target):
            file = open(offer.part, "ab")  # noqa: SIM115  closed below, where errors are its own
        with contextlib.closing(_Watched(file, offer, lambda done: on_progress(done, total, offer.file))) as watched:
            http_get: Any = file_download.http_get
            # without `proxies` older versions may hand the whole file to hf_transfer, which cannot go on nor be stopped
            older: dict[str, Any] = {"proxies": {}} if "proxies" in inspect.signature(http_get).parameters else {}
            http_get(
                found.location, watched, resume_size=offer.kept, headers=headers, expected_size=offer.size,
                displayed_filename=offer.target.name, **older,
            )  # fmt: skip


class _Watched:
    """The part while it grows: says how far it is, and turns errors of the disk into ours."""

    def __init__(self, file: BinaryIO, offer: Offer, tell: Any) -> None:
        self._file, self._offer, self._tell = file, offer, tell
        self._tell(file.tell())

    def write(self, data: bytes) -> int:
        with explained(self._offer.target):
            if self._file.tell() + len(data) > self._offer.size:
                raise BadFileError(f"{self._offer.file}: more came than the hub announced; fetch it again")
            written = self._file.write(data)
        self._tell(self._file.tell())
        return written

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def truncate(self) -> int:
        return self._file.truncate()

    def close(self) -> None:
        with explained(self._offer.target), self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def _small_pieces(hub: Any, file_download: Any) -> Iterator[None]:
    """Let huggingface_hub hand over a megabyte at a time in the place of ten: Cancel is heard sooner, and less is lost."""
    name = "DOWNLOAD_CHUNK_SIZE"
    places = [place for place in (hub.constants, file_download) if hasattr(place, name)]
    before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, _PIECE)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


def _checked(offer: Offer, on_progress: Progress) -> str:
    """The SHA-256 of the part, which is what was announced. Raises BadFileError, and keeps nothing, where it is not."""
    total = _steps(offer)
    digest, done = hashlib.sha256(), 0
    with explained(offer.target), open(offer.part, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            done += len(piece)
            on_progress(offer.size + done // _CHECK_SHARE, total, "checking")
    found = digest.hexdigest()
    try:
        if done != offer.size or (offer.sha256 and found != offer.sha256):
            announced = f"{offer.size:,} bytes" + (f" with SHA-256 {offer.sha256[:16]}…" if offer.sha256 else "")
            raise BadFileError(
                f"{offer.target.name}: {done:,} bytes with SHA-256 {found[:16]}… came, expected {announced} as the hub "
                "announced; nothing of it is kept: fetch it again"
            )
        read_header(offer.part)
    except BadFileError:
        offer.part.unlink(missing_ok=True)
        raise
    return found


def _part_of(target: Path, tag: str) -> Path:
    return target.with_name(f".{target.name}.{tag}.fetch")


def _is_part(path: Path, target: Path) -> bool:
    return path.name.startswith(f".{target.name}.") and path.name.endswith(".fetch")


def _remove_other_parts(offer: Offer) -> None:
    """Remove what is left of a version that the hub does not have any more."""
    with explained(offer.target):
        for path in offer.target.parent.iterdir():
            if _is_part(path, offer.target) and (path != offer.part or offer.kept > offer.size):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(offer: Offer) -> Iterator[None]:
    """Keep others, such as a fetch from before the WebUI reloaded its page, from writing to the same part. BusyError."""
    from filelock import FileLock, Timeout  # comes with huggingface_hub, and with torch

    place = offer.target.with_name(f".{offer.target.name}.lock")
    lock = FileLock(str(place))
    with explained(offer.target):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BusyError(f"{offer.reference.name}: is being fetched already; wait until it is here") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)  # Windows removes no open file: there it goes after the release
        lock.release()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
