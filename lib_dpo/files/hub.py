"""Names such as hub:owner/name or hub:owner/name/file, fetched by huggingface_hub into its cache, after consent."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lib_dpo.errors import BadFileError, NotAllowedError, OutputError, SettingError, missing_extra, nearest
from lib_dpo.files.atomic import write_text_atomic
from lib_dpo.files.checkpoint import COMPONENTS, choose_weights
from lib_dpo.files.hashes import user_cache

logger = logging.getLogger(__name__)

PREFIX = "hub:"
_NAME = re.compile(
    rf"{PREFIX}(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<file>[^\\:?#\x00-\x1f]+\.(safetensors|ckpt|pt|pth)))?", re.ASCII
)
_MISSPELT = re.compile(r"(hub|hf|huggingface)\s*[:/\\]+\s*(?P<name>[\w-][\w.-]*[/\\]+.+)", re.IGNORECASE)
_ADDRESS = re.compile(
    r"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+?)"
    r"(/(tree|blob|resolve)/[\w.-]+(/(?P<file>[^?#]+))?)?/?([?#].*)?",
    re.IGNORECASE,
)


def resolve(spec: str | Path, *, consent: Callable[[str], bool]) -> Path:
    """The local file or folder for a name. What does not begin with hub: is a path, and comes back as it is.

    What is in the cache already needs neither consent nor a network. For the rest the hub is asked what there is (the
    only request before consent: without it nobody knows the size), and `consent` gets one sentence to say yes or no to.
    A repository without a file name stands for its diffusers folder, or else for the only .safetensors at its root.

    Raises SettingError for a malformed name, BadFileError for what the hub does not have or cannot deliver,
    NotAllowedError where consent is refused, MissingExtraError without huggingface_hub.
    """
    if not str(spec).startswith(PREFIX):
        return Path(spec)
    repo, file = _parse(str(spec))
    hub = library("names that begin with hub: need")
    with without_telemetry(hub):
        cached = _cached(hub, repo, file, "main") if file else None
        return cached or _remembered(hub, str(spec)) or _fetched(hub, repo, file, consent)


def meant_on_the_hub(spec: str) -> str | None:
    """The hub: name that a misspelt one or an address of the hub stands for, or None."""
    if match := _ADDRESS.fullmatch(spec):
        name = PREFIX + match["repo"] + (f"/{match['file']}" if match["file"] else "")
    elif match := _MISSPELT.fullmatch(spec):
        name = PREFIX + re.sub(r"[/\\]+", "/", match["name"]).strip("/ ")
    else:
        return None
    return name if _NAME.fullmatch(name) else None


def _parse(spec: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(spec)
    if match is None or "--" in match["repo"] or re.search(r"\.\.|//|/\./", spec):
        meant = meant_on_the_hub(spec)
        advice = f"did you mean {meant}?" if meant else "correct it"
        raise SettingError(
            f"{spec}: is no name on the hub, expected hub:owner/name or hub:owner/name/file.safetensors; {advice}"
        )
    return match["repo"], match["file"]


def _fetched(hub: Any, repo: str, file: str | None, consent: Callable[[str], bool]) -> Path:
    try:
        commit, sizes = _listing(hub, repo)
    except UnreachableError as error:
        if file is None and (local := _newest_cached(hub, repo)):
            logger.warning("%s; using what the cache has of it", error)
            return local
        raise
    if file and file not in sizes:
        near = nearest(file, sizes)
        advice = f"did you mean {near}?" if near else "correct the name"
        raise BadFileError(f"{repo}: has no file {file}, expected one of {weights_among(sizes)}; {advice}")
    target, wanted = (file, [file]) if file else _choose(repo, sizes)
    missing = [each for each in wanted if not _cached(hub, repo, each, commit)]
    if missing and not consent(_question(hub, repo, missing, sizes)):
        raise NotAllowedError(f"{PREFIX}{repo}: is not in the cache, and the download was not agreed to; allow it")
    with hub_explained(hub, repo):
        paths = [Path(hub.hf_hub_download(repo, each, revision=commit)) for each in wanted]
    found = paths[0].parents[wanted[0].count("/")] / target
    _remember(hub, f"{PREFIX}{repo}/{file}" if file else f"{PREFIX}{repo}", found, paths)
    return found


def _choose(repo: str, names: Collection[str]) -> tuple[str, list[str]]:
    """What to open, "" for the folder, and the files to have for it. Never a pickle."""
    wanted = [path for component in COMPONENTS for path in _component_files(component, names)]
    if any(path.startswith("unet/") for path in wanted):
        return "", [*wanted, *(name for name in names if name == "model_index.json")]
    root = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if len(root) == 1:
        return root[0], root
    raise BadFileError(
        f"{repo}: has {len(root)} .safetensors files at its root and no unet/, expected one or the other; "
        f"name one of {weights_among(names)} as {PREFIX}{repo}/…"
    )


def _component_files(component: str, names: Collection[str]) -> list[str]:
    inside = {name.partition("/")[2] for name in names if name.partition("/")[0] == component}
    index, weights = choose_weights(inside)
    if not weights:
        return []
    extra = [name for name in (index, "config.json") if name in inside]
    return [f"{component}/{name}" for name in (*weights, *extra)]


def weights_among(names: Collection[str]) -> str:
    """The first of the weight files among names, for people."""
    found = sorted(name for name in names if name.endswith((".safetensors", ".ckpt")))
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "") or "(no weights at all)"


def _question(hub: Any, repo: str, missing: list[str], sizes: Mapping[str, int | None]) -> str:
    what = missing[0] if len(missing) == 1 else f"{len(missing)} files"
    known = [size for size in map(sizes.get, missing) if size is not None]
    size = f" ({sum(known) / 1e6:,.1f} MB)" if len(known) == len(missing) else ""
    return f"Download {what}{size} of {repo} from {hub.constants.ENDPOINT} to {hub.constants.HF_HUB_CACHE}?"


class UnreachableError(BadFileError):
    """The hub does not answer; what the cache has may still do."""


def _listing(hub: Any, repo: str) -> tuple[str, dict[str, int | None]]:
    """The newest commit of a repository, and the files in it with their sizes where the hub tells them."""
    with hub_explained(hub, repo):
        info = hub.HfApi().model_info(repo, files_metadata=True)
        return info.sha or "main", {each.rfilename: each.size for each in info.siblings or ()}


@contextlib.contextmanager
def hub_explained(hub: Any, repo: str) -> Iterator[None]:
    """Turn what huggingface_hub and the HTTP library below it raise into one line of ours."""
    place = f"{repo} at {hub.constants.ENDPOINT}"
    http_errors = hub.utils.HfHubHTTPError.__bases__  # of requests, httpx or httpx2, by its version
    try:
        yield
    except hub.utils.GatedRepoError as error:
        raise BadFileError(
            f"{place}: is open only to those who accept its terms; accept them there and log in (`hf auth login`)"
        ) from error
    except hub.utils.RepositoryNotFoundError as error:
        raise BadFileError(f"{place}: does not exist, or is private; correct the name, or log in") from error
    except (OSError, ValueError, TypeError, LookupError, hub.utils.EntryNotFoundError, *http_errors) as error:
        # ValueError, TypeError, LookupError: an answer that no hub would give, such as a log-in page
        raise UnreachableError(
            f"{place}: cannot be fetched ({_reason(error)}); check the network, HF_ENDPOINT, HF_HUB_OFFLINE, free space"
        ) from error


def _reason(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 160 else text[:150] + "…"


def _cached(hub: Any, repo: str, name: str, revision: str) -> Path | None:
    found = hub.try_to_load_from_cache(repo, name, revision=revision)
    return Path(found) if isinstance(found, str) else None  # a marker says that the hub does not have it


def _newest_cached(hub: Any, repo: str) -> Path | None:
    """What a repository stands for by the files of it that the cache has (the layout of the cache is documented)."""
    folder = Path(hub.constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))
    try:
        root = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        return root / _choose(repo, names)[0]
    except (OSError, BadFileError):
        return None


def _memory_key(hub: Any, spec: str) -> str:
    return f"{spec} {hub.constants.ENDPOINT} {hub.constants.HF_HUB_CACHE}"


def _remembered(hub: Any, spec: str) -> Path | None:
    """What a name stood for when it was last fetched, if all of it is still there.

    The cache itself does not tell whether it has all the files of a repository that are wanted.
    """
    target, files = _load_memory().get(_memory_key(hub, spec), ("", []))
    return Path(target) if files and all(Path(file).is_file() for file in files) else None


def _remember(hub: Any, spec: str, target: Path, files: list[Path]) -> None:
    memory = {**_load_memory(), _memory_key(hub, spec): (str(target), [str(file) for file in files])}
    try:
        write_text_atomic(user_cache("hub.json"), json.dumps(memory, indent=1))
    except (OutputError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        logger.info("%s is not remembered: %s", spec, error)


def _load_memory() -> dict[str, tuple[str, list[str]]]:
    try:
        rows = json.loads(user_cache("hub.json").read_bytes())
        return {str(key): (str(target), [str(file) for file in files]) for key, (target, files) in rows.items()}
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:  # anything can be in it
        logger.info("the record of fetched repositories is not used: %s", error)
        return {}


@contextlib.contextmanager
def without_telemetry(hub: Any) -> Iterator[None]:
    """Requests that do not tell which libraries are installed here."""
    before = hub.constants.HF_HUB_DISABLE_TELEMETRY
    hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        hub.constants.HF_HUB_DISABLE_TELEMETRY = before


def library(purpose: str) -> Any:
    """huggingface_hub, imported when it is needed. Raises MissingExtraError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError as error:
        raise missing_extra(purpose, "huggingface_hub", instead="download the file yourself") from error
    return huggingface_hub
