"""References from a hub of our own on this machine: whole, resumed, refused; never over a file, never without consent."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save
from test_hub import Hub, environment

from lib_dpo.errors import BadFileError, MissingExtraError, OutputError
from lib_dpo.files.references import fetch as fetching
from lib_dpo.files.references.known import FORMS, NOT_KNOWN, REFERENCES, UNET_FILE, Known, known

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

needs_library = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="needs huggingface_hub")
MB = 1_000_000
DPO = "mhdang/dpo-sd1.5-text2image-v1"
DATA = save({"a": torch.arange(1_500_000, dtype=torch.float32)})  # 6 MB, six of the pieces in which it comes


class FilesHub(Hub):
    """The hub with its files elsewhere, as the real one has them: large, asked for in ranges, with connections that break."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: list[int] = []  # bytes after which each of the next answers breaks off
        self.slow = 0.0  # seconds for each 100 kB
        self.etag = ""  # in the place of the SHA-256
        self.wrong = False  # whether other bytes come than were announced
        self.ranges: list[str | None] = []  # of each request for a file's bytes

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/api/") or "/resolve/" not in path:
            super().answer(request)
            return
        repo, name = "/".join(path.split("/")[1:3]), path.split("/", 5)[5]
        data = self.repos.get(repo, {}).get(name)
        if data is None or repo in self.refuse:
            super().answer(request)
            return
        self.requests.append((request.command, path, request.headers["User-Agent"]))
        digest = hashlib.sha256(data).hexdigest()
        start = 0
        if request.command == "GET":
            wanted = request.headers["Range"]
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-").split("-")[0]) if wanted else 0
        body = (b"\0" * len(data) if self.wrong else data)[start:]
        request.send_response(206 if start else 200)
        headers = {"X-Repo-Commit": self.commit(repo), "ETag": f'"{self.etag or digest}"', "Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            self._send_slowly(request, body)

    def _send_slowly(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        if self.breaks:
            body = body[: self.breaks.pop(0)]
        with contextlib.suppress(OSError):  # who asked is gone
            for place in range(0, len(body), 100_000):
                request.wfile.write(body[place : place + 100_000])
                time.sleep(self.slow)
        request.close_connection = True


WORKER = """
import json, shutil, sys
from collections import namedtuple
from pathlib import Path
import torch
from lib_dpo.errors import Cancelled
from lib_dpo.files.references.fetch import ask, fetch, kept_of
from lib_dpo.files.references.known import known
for line in sys.stdin:
    name, folder, options = json.loads(line)
    answer, told = {"error": None, "message": ""}, []
    def progress(done, total, key):
        told.append(done / total)
        if options.get("cancel_at") and done / total > options["cancel_at"]:
            raise Cancelled("stopped")
    usage = shutil.disk_usage
    if options.get("free") is not None:
        shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(0, 0, options["free"])
    try:
        offer = ask(known(name), Path(folder))
        answer["offer"] = [offer.file, str(offer.target), offer.size, offer.sha256, offer.licence, offer.kept]
        if options.get("ask_only"):
            pass
        else:
            found = fetch(offer, progress)
            answer["fetched"] = [str(found.path), found.size, found.sha256, found.announced]
    except Exception as error:
        answer |= {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    shutil.disk_usage = usage
    print(json.dumps({**answer, "told": told, "kept": kept_of(known(name), Path(folder))}), flush=True)
"""


class Fetcher:
    """A process of its own that asks and fetches: huggingface_hub reads its settings when it is imported."""

    def __init__(self, folder: Path, endpoint: str, **others: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=Path(__file__).parent.parent, env=environment(folder, endpoint, **others),
        )  # fmt: skip

    def fetch(self, name: str, folder: Path, **options: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([name, str(folder), options]) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def served() -> Iterator[FilesHub]:
    hub = FilesHub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def process(served: FilesHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetcher]:
    with contextlib.closing(Fetcher(tmp_path_factory.mktemp("home"), served.endpoint)) as process:
        yield process


@pytest.fixture
def hub(served: FilesHub) -> FilesHub:
    served.repos = {DPO: {UNET_FILE: DATA, "unet/config.json": b"{}"}}
    served.refuse, served.breaks, served.slow, served.wrong, served.etag = {}, [], 0.0, False, ""
    served.requests.clear()
    served.ranges.clear()
    return served


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# the table


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda each: each.name)
def test_every_reference_says_what_is_known_of_it(reference: Known):
    assert reference.base in ("SD 1.5", "SDXL 1.0")
    assert reference.form in FORMS
    assert reference.tuned_for
    assert reference.paper == NOT_KNOWN or reference.paper[4] == "."
    assert reference.licence is None or reference.licence in ("openrail++", "apache-2.0")
    assert reference.size is None or reference.file, "the size of which file?"
    assert reference.repo.count("/") == 1
    assert known(reference.name) is reference


def test_names_and_repositories_are_given_once():
    for values in ({each.name for each in REFERENCES}, {each.repo for each in REFERENCES}):
        assert len(values) == len(REFERENCES)


def test_the_published_dpo_references_are_there_with_their_sizes():
    found = {each.repo: (each.size, each.licence, each.file) for each in REFERENCES}
    assert found[DPO] == (3_440_000_000, "openrail++", UNET_FILE)
    assert found["mhdang/dpo-sdxl-text2image-v1"] == (10_300_000_000, "openrail++", UNET_FILE)


def test_by_hand_names_file_address_and_place():
    words = fetching.by_hand(REFERENCES[0], "models/DPO/dpo-sd1.5.safetensors")
    assert UNET_FILE in words
    assert f"https://huggingface.co/{DPO}" in words
    assert words.endswith("models/DPO/dpo-sd1.5.safetensors")


def test_without_the_library_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="huggingface_hub"):
        fetching.ask(REFERENCES[0], tmp_path)


def test_what_is_no_single_file_is_refused_before_anything_is_asked(tmp_path: Path):
    two = next(each for each in REFERENCES if each.form == "two")
    with pytest.raises(BadFileError, match="published as two models"):
        fetching.ask(two, tmp_path)


# with a hub


@needs_library
def test_the_offer_says_what_would_be_fetched_and_fetches_nothing(hub: FilesHub, process: Fetcher, tmp_path: Path):
    found = process.fetch("dpo-sd1.5", tmp_path / "DPO", ask_only=True)
    target = str(tmp_path / "DPO" / "dpo-sd1.5.safetensors")
    assert found["offer"] == [UNET_FILE, target, len(DATA), hashlib.sha256(DATA).hexdigest(), "openrail++", 0]
    assert [method for method, _, _ in hub.requests] == ["GET", "HEAD"]
    assert not left_in(tmp_path)


@needs_library
def test_a_reference_is_fetched_whole_with_its_hash(hub: FilesHub, process: Fetcher, tmp_path: Path):
    found = process.fetch("dpo-sd1.5", tmp_path / "DPO")
    assert found["fetched"] == [
        str(tmp_path / "DPO" / "dpo-sd1.5.safetensors"), len(DATA), hashlib.sha256(DATA).hexdigest(), True,
    ], found  # fmt: skip
    assert (tmp_path / "DPO" / "dpo-sd1.5.safetensors").read_bytes() == DATA
    assert left_in(tmp_path / "DPO") == ["dpo-sd1.5.safetensors"]
    assert found["told"] == sorted(found["told"])
    assert len(found["told"]) > 5
    assert found["told"][-1] == pytest.approx(1, abs=1e-3)
    assert not any("torch" in agent for _, _, agent in hub.requests), "requests tell what is installed here"


@needs_library
def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: FilesHub, process: Fetcher, tmp_path: Path):
    """Within one fetch where huggingface_hub asks again by itself, else by the next fetch: no byte is asked for twice."""
    hub.breaks = [3 * MB]
    found = process.fetch("dpo-sd1.5", tmp_path)
    if found["error"]:
        assert "UnreachableError" in found["error"], found
        assert "are kept, and the next fetch goes on from there" in found["message"]
        assert left_in(tmp_path) == [name for name in left_in(tmp_path) if name.endswith(".fetch")]
        assert found["kept"] > MB
        found = process.fetch("dpo-sd1.5", tmp_path)
    assert (tmp_path / "dpo-sd1.5.safetensors").read_bytes() == DATA, found
    assert len(hub.ranges) == 2
    assert hub.ranges[0] is None
    assert hub.ranges[1]
    start = int(hub.ranges[1].removeprefix("bytes=").rstrip("-"))
    assert 2 * MB <= start <= 3 * MB, hub.ranges


@needs_library
def test_a_fetch_that_was_cancelled_goes_on_and_leaves_nothing_under_its_name(hub: FilesHub, process: Fetcher, tmp_path: Path):
    found = process.fetch("dpo-sd1.5", tmp_path, cancel_at=0.4)
    assert found["error"][0] == "Cancelled"
    assert "are kept, and the next fetch goes on from there" in found["message"]
    assert not (tmp_path / "dpo-sd1.5.safetensors").exists()
    kept = found["kept"]
    assert 0.3 * len(DATA) < kept < 0.8 * len(DATA)
    again = process.fetch("dpo-sd1.5", tmp_path)
    assert (tmp_path / "dpo-sd1.5.safetensors").read_bytes() == DATA, again
    assert again["told"][0] == pytest.approx(kept / len(DATA) / 1.05, abs=0.01), "what is here counts from the start"
    assert hub.ranges == [None, f"bytes={kept}-"]
    assert left_in(tmp_path) == ["dpo-sd1.5.safetensors"]


@needs_library
def test_other_bytes_than_were_announced_are_refused_and_removed(hub: FilesHub, process: Fetcher, tmp_path: Path):
    hub.wrong = True
    found = process.fetch("dpo-sd1.5", tmp_path)
    assert "BadFileError" in found["error"]
    assert hashlib.sha256(DATA).hexdigest()[:16] in found["message"]
    assert "nothing of it is kept" in found["message"]
    assert not left_in(tmp_path)


@needs_library
def test_what_is_no_checkpoint_is_refused_even_with_the_right_hash(hub: FilesHub, process: Fetcher, tmp_path: Path):
    hub.repos[DPO][UNET_FILE] = b"<html>log in</html>" * 100
    assert "web page" in process.fetch("dpo-sd1.5", tmp_path)["message"]
    assert not left_in(tmp_path)


@needs_library
def test_a_hash_that_is_not_announced_is_shown_and_said_to_be_so(hub: FilesHub, process: Fetcher, tmp_path: Path):
    hub.etag = "0a" * 20  # of a file that lies in git itself
    found = process.fetch("dpo-sd1.5", tmp_path)
    assert found["offer"][3] == ""
    assert found["fetched"][2:] == [hashlib.sha256(DATA).hexdigest(), False]


@needs_library
def test_a_full_disk_is_refused_before_anything_is_fetched(hub: FilesHub, process: Fetcher, tmp_path: Path):
    found = process.fetch("dpo-sd1.5", tmp_path / "DPO", free=len(DATA) + 100 * MB)
    assert "OutputError" in found["error"]
    assert "free some space" in found["message"]
    assert not hub.ranges
    assert not left_in(tmp_path)


@needs_library
def test_a_persons_own_file_of_that_name_is_not_touched(hub: FilesHub, process: Fetcher, tmp_path: Path):
    own = tmp_path / "dpo-sd1.5.safetensors"
    own.write_bytes(b"mine")
    found = process.fetch("dpo-sd1.5", tmp_path)
    assert "exists already" in found["message"]
    assert (own.read_bytes(), left_in(tmp_path), hub.ranges) == (b"mine", [own.name], [])


@needs_library
def test_a_version_that_is_gone_is_not_mixed_with_the_new_one(hub: FilesHub, process: Fetcher, tmp_path: Path):
    process.fetch("dpo-sd1.5", tmp_path, cancel_at=0.4)
    newer = save({"a": torch.zeros(1_500_000)})
    hub.repos[DPO][UNET_FILE] = newer
    hub.ranges.clear()
    process.fetch("dpo-sd1.5", tmp_path)
    assert hub.ranges == [None]
    assert (tmp_path / "dpo-sd1.5.safetensors").read_bytes() == newer
    assert left_in(tmp_path) == ["dpo-sd1.5.safetensors"]


@needs_library
def test_the_file_of_a_repository_whose_form_is_not_known_is_found(hub: FilesHub, process: Fetcher, tmp_path: Path):
    reference = known("inpo-sd1.5")
    assert reference
    cases: list[tuple[dict[str, bytes], str | None]] = [
        ({UNET_FILE: DATA, "unet/config.json": b"{}", "vae/diffusion_pytorch_model.safetensors": DATA}, UNET_FILE),
        ({"diffusion_pytorch_model.safetensors": DATA, "config.json": b"{}"}, "diffusion_pytorch_model.safetensors"),
        ({"unet/diffusion_pytorch_model.bin": b"\x80"}, None),
        ({"README.md": b""}, None),
    ]
    for files, expected in cases:
        hub.repos[reference.repo] = files
        found = process.fetch(reference.name, tmp_path, ask_only=True)
        if expected:
            assert found["offer"][0] == expected, found
            assert found["offer"][4] == NOT_KNOWN, "a licence that nobody states is not guessed"
        else:
            assert "no single .safetensors file" in found["message"], found


@needs_library
@pytest.mark.parametrize("reason", ["nobody there", "offline"])
def test_without_a_network_it_says_so_and_leaves_nothing(hub: FilesHub, tmp_path: Path, reason: str):
    endpoint, offline = (hub.endpoint, "1") if reason == "offline" else ("http://127.0.0.1:9", "0")
    with contextlib.closing(Fetcher(tmp_path / "home", endpoint, HF_HUB_OFFLINE=offline)) as process:
        found = process.fetch("dpo-sd1.5", tmp_path / "DPO")
    assert "UnreachableError" in found["error"], found
    assert "check the network" in found["message"]
    assert not (tmp_path / "DPO").exists()


@needs_library
def test_two_fetches_of_one_file_do_not_write_to_it_both(hub: FilesHub, process: Fetcher, tmp_path: Path):
    from filelock import FileLock

    with FileLock(str(tmp_path / ".dpo-sd1.5.safetensors.lock")):
        found = process.fetch("dpo-sd1.5", tmp_path)
    assert found["error"][0] == "BusyError", found
    assert not hub.ranges


def test_a_folder_that_is_closed_is_refused(tmp_path: Path):
    target = tmp_path / "file" / "dpo-sd1.5.safetensors"
    (tmp_path / "file").write_bytes(b"")
    offer = fetching.Offer(REFERENCES[0], UNET_FILE, target, 10, "", NOT_KNOWN, "main", "x")
    with pytest.raises(OutputError, match="no folder that may be written to"):
        fetching.check_room(offer)
