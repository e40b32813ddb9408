"""hub: names against a hub of our own on this machine, through the real huggingface_hub, and never without consent."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import tiny
import torch
from safetensors.torch import load_file, save

from lib_dpo import errors
from lib_dpo.errors import BadFileError, MissingExtraError, NotAllowedError, SettingError
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.files.hub import resolve

needs_library = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"), reason="needs huggingface_hub")

UNET = "diffusion_pytorch_model"
ONE = save({"a": torch.ones(1)})
TWO = save({"b": torch.ones(2)})
INDEX = json.dumps({"weight_map": {"a": f"{UNET}-1-of-2.safetensors", "b": f"{UNET}-2-of-2.safetensors"}}).encode()
PIPELINE = {
    "model_index.json": b"{}",
    "README.md": b"# model",
    "v1-5-pruned.safetensors": ONE,
    "unet/config.json": b"{}",
    f"unet/{UNET}.safetensors": ONE,
    f"unet/{UNET}.fp16.safetensors": TWO,
    f"unet/{UNET}.bin": b"\x80",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.fp16.safetensors": TWO,
    "text_encoder_2/pytorch_model.bin": b"\x80",
    "text_encoder_2/config.json": b"{}",
    "vae/sub/model.safetensors": ONE,
    "safety_checker/model.safetensors": ONE,
}
SHARDED = {
    "unet/config.json": b"{}",
    f"unet/{UNET}.safetensors.index.json": INDEX,
    f"unet/{UNET}-1-of-2.safetensors": ONE,
    f"unet/{UNET}-2-of-2.safetensors": TWO,
}


class Hub:
    """As much of the Hub's HTTP interface as huggingface_hub needs to list and to download."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.refuse: dict[str, tuple[int, str]] = {}  # repository -> status and error code of all answers
        self.truncated: set[str] = set()
        self.requests: list[tuple[str, str, str]] = []  # method, path, user agent
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def asked(self, repo: str) -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.requests if f"/{repo}" in path]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path, request.headers["User-Agent"]))
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo in self.refuse:
            status, code = self.refuse[repo]
            return self.send(request, status, b"<html>no</html>", {"X-Error-Code": code} if code else {})
        if repo not in self.repos:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.repos[repo].items()]
            info = {"id": repo, "sha": self.commit(repo), "siblings": siblings}
            info |= {"private": False, "downloads": 0, "likes": 0, "tags": []}
            return self.send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        headers = {"X-Repo-Commit": self.commit(repo)}
        name = path.split("/", 5)[5]
        if name not in self.repos[repo]:
            return self.send(request, 404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        data = self.repos[repo][name]
        headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Content-Length": str(len(data))}
        if repo in self.truncated and request.command == "GET":
            data = data[: len(data) // 2]
        return self.send(request, 200, data, headers)

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)


WORKER = """
import json, logging, sys
import torch
from lib_dpo.files.hub import resolve
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger("lib_dpo.files.hub").addHandler(handler)
for line in sys.stdin:
    spec, answer = json.loads(line)
    questions, answered = [], {"path": None, "error": None, "message": ""}
    records.clear()
    try:
        answered["path"] = str(resolve(spec, consent=lambda question: questions.append(question) or answer))
    except Exception as error:
        answered |= {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    print(json.dumps({**answered, "questions": questions, "logged": list(records)}), flush=True)
"""


def environment(folder: Path, endpoint: str, **others: str) -> dict[str, str]:
    """Of a process for which `endpoint` is the Hub and `folder` holds every cache."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HOME": str(folder),
        "LOCALAPPDATA": str(folder / "cache"),
        "NO_PROXY": "127.0.0.1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return {key: value for key, value in os.environ.items() if "TELEMETRY" not in key} | settings | others


class Client:
    """A process of its own that resolves names: huggingface_hub reads its settings when it is imported."""

    def __init__(self, folder: Path, endpoint: str, **others: str) -> None:
        self.cache = folder / "hub"
        self.memory = folder / "cache" / "sd-webui-dpo" / "hub.json"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parent.parent,
            env=environment(folder, endpoint, **others),
        )

    def resolve(self, spec: str, *, answer: bool) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([spec, answer]) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with contextlib.closing(Client(tmp_path_factory.mktemp("client"), hub.endpoint)) as client:
        yield client


def refused(answer: dict[str, Any], kind: type[errors.DpoError]) -> str:
    assert answer["error"], answer
    assert kind.__name__ in answer["error"], answer
    assert "\n" not in answer["message"]
    return str(answer["message"])


def in_cache(cache: Path, repo: str, commit: str, files: dict[str, bytes]) -> Path:
    """What another program has downloaded, in the layout of huggingface_hub's cache."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name, data in files.items():
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "snapshots" / commit


# without a hub


@pytest.mark.parametrize("path", ["a.safetensors", Path("models") / "a.ckpt", "/models/hub:x", "hubs/a"])
def test_paths_come_back_as_they_are(path: str | Path):
    assert resolve(path, consent=lambda question: pytest.fail(question)) == Path(path)


@pytest.mark.parametrize(
    "spec",
    ["hub:", "hub:owner", "hub:owner/", "hub:/name", "hub:owner/name/", "hub:owner/name/weights.bin", "hub:a/b/README.md",
     "hub:a/../b.safetensors", "hub:a/b/../../c.safetensors", "hub:a/b//c.safetensors", "hub:a/b\\c.safetensors",
     "hub:https://huggingface.co/a/b", "hub:a/b/c.safetensors?x", "hub:a b/c", "hub:a--b/c", "hub:../x", "hub:a/b\n"],
)  # fmt: skip
def test_malformed_names_are_refused(spec: str):
    with pytest.raises(SettingError, match="hub:owner/name"):
        resolve(spec, consent=lambda question: pytest.fail(question))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="-m pip install huggingface_hub"):
        resolve("hub:owner/name", consent=lambda question: pytest.fail(question))


# with a hub


@needs_library
def test_a_file_is_fetched_after_consent_and_once(hub: Hub, client: Client):
    hub.repos["own/offsets"] = {"a.safetensors": ONE, "sub/b (v1).safetensors": TWO, "README.md": b""}
    first = client.resolve("hub:own/offsets/sub/b (v1).safetensors", answer=True)
    assert first["questions"] == [
        f"Download sub/b (v1).safetensors (0.0 MB) of own/offsets from {hub.endpoint} to {client.cache}?"
    ]
    path = Path(first["path"])
    assert (path.name, path.read_bytes()) == ("b (v1).safetensors", TWO)
    assert client.cache in path.parents
    hub.requests.clear()
    again = client.resolve("hub:own/offsets/sub/b (v1).safetensors", answer=False)
    assert (again["path"], again["questions"], hub.requests) == (str(path), [], [])


@needs_library
def test_refusing_consent_downloads_nothing(hub: Hub, client: Client):
    hub.repos["own/refused"] = dict(PIPELINE)
    answer = client.resolve("hub:own/refused", answer=False)
    assert "not agreed to" in refused(answer, NotAllowedError)
    assert len(answer["questions"]) == 1
    assert hub.asked("own/refused") == ["GET /api/models/own/refused"]
    assert not list(client.cache.glob("*refused*"))


@needs_library
def test_a_folder_is_fetched_with_what_can_be_read_and_no_more(hub: Hub, client: Client):
    hub.repos["own/pipeline"] = dict(PIPELINE)
    first = client.resolve("hub:own/pipeline", answer=True)
    assert "5 files (0.0 MB)" in first["questions"][0]
    folder = Path(first["path"])
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "unet/config.json",
        f"unet/{UNET}.safetensors",
    ]
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.infos) == ["unet.a", "text_encoder.b"]
        assert checkpoint.name == "pipeline"
    hub.requests.clear()
    again = client.resolve("hub:own/pipeline", answer=False)
    assert (again["path"], again["questions"], hub.requests) == (str(folder), [], [])


@needs_library
def test_shards_are_fetched_with_their_index(hub: Hub, client: Client):
    hub.repos["own/sharded"] = dict(SHARDED)
    with open_checkpoint(client.resolve("hub:own/sharded", answer=True)["path"]) as checkpoint:
        assert list(checkpoint.infos) == ["unet.a", "unet.b"]


@needs_library
def test_the_only_file_at_the_root_is_fetched(hub: Hub, client: Client):
    hub.repos["own/single"] = {"it.safetensors": ONE, "it.ckpt": b"\x80", "vae/model.safetensors": TWO, "README.md": b""}
    assert Path(client.resolve("hub:own/single", answer=True)["path"]).name == "it.safetensors"
    hub.requests.clear()
    assert client.resolve("hub:own/single", answer=False)["questions"] == hub.requests == []


@needs_library
def test_several_files_at_the_root_are_listed(hub: Hub, client: Client):
    hub.repos["own/several"] = {f"{number}.safetensors": ONE for number in range(10)}
    message = refused(client.resolve("hub:own/several", answer=True), BadFileError)
    assert "0.safetensors, 1.safetensors" in message
    assert "and 2 more" in message


@needs_library
def test_a_file_that_is_not_there_is_refused_with_those_that_are(hub: Hub, client: Client):
    hub.repos["own/offsets2"] = {"right.safetensors": ONE}
    message = refused(client.resolve("hub:own/offsets2/wrong.safetensors", answer=True), BadFileError)
    assert "right.safetensors" in message


@needs_library
def test_what_another_program_has_fetched_is_used(hub: Hub, client: Client):
    root = in_cache(client.cache, "own/known", "0a" * 20, {"a.safetensors": ONE})
    answer = client.resolve("hub:own/known/a.safetensors", answer=False)
    assert (answer["path"], hub.asked("own/known")) == (str(root / "a.safetensors"), [])
    hub.repos["own/known2"] = dict(PIPELINE)
    root = in_cache(client.cache, "own/known2", hub.commit("own/known2"), PIPELINE)
    answer = client.resolve("hub:own/known2", answer=False)
    assert (answer["path"], answer["questions"]) == (str(root), [])


@needs_library
def test_what_changed_on_the_hub_needs_consent_again(hub: Hub, client: Client):
    in_cache(client.cache, "own/changed", "0b" * 20, SHARDED)
    hub.repos["own/changed"] = {**SHARDED, "unet/config.json": b'{"new": 1}'}
    answer = client.resolve("hub:own/changed", answer=False)
    refused(answer, NotAllowedError)
    assert "4 files" in answer["questions"][0]


@needs_library
def test_what_was_deleted_from_the_cache_needs_consent_again(hub: Hub, client: Client):
    hub.repos["own/deleted"] = dict(SHARDED)
    folder = Path(client.resolve("hub:own/deleted", answer=True)["path"])
    (folder / "unet" / f"{UNET}-2-of-2.safetensors").unlink()
    answer = client.resolve("hub:own/deleted", answer=False)
    refused(answer, NotAllowedError)
    assert f"Download unet/{UNET}-2-of-2.safetensors " in answer["questions"][0]


@needs_library
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "does not exist, or is private"),
        (401, "RepoNotFound", "does not exist, or is private"),
        (403, "GatedRepo", "accept its terms"),
        (500, "", "cannot be fetched"),
        (200, "", "cannot be fetched"),
    ],
)
def test_answers_of_the_hub_are_explained(hub: Hub, client: Client, status: int, code: str, message: str):
    repo = f"own/answers{status}"
    hub.refuse[repo] = (status, code)
    answer = client.resolve(f"hub:{repo}", answer=True)
    assert message in refused(answer, BadFileError)
    assert f"{repo} at {hub.endpoint}" in answer["message"]
    assert answer["questions"] == []


@needs_library
def test_a_download_that_breaks_off_is_refused(hub: Hub, client: Client):
    hub.repos["own/broken"] = {"a.safetensors": ONE}
    hub.truncated.add("own/broken")
    refused(client.resolve("hub:own/broken", answer=True), BadFileError)
    hub.truncated.clear()
    assert Path(client.resolve("hub:own/broken", answer=True)["path"]).read_bytes() == ONE


@needs_library
def test_a_bad_record_does_no_harm(hub: Hub, client: Client):
    hub.repos["own/record"] = {"a.safetensors": ONE}
    client.memory.parent.mkdir(parents=True, exist_ok=True)
    client.memory.write_text('{"x": 3}')
    assert client.resolve("hub:own/record", answer=True)["path"]
    assert any("own/record" in key for key in json.loads(client.memory.read_text()))


@needs_library
def test_requests_do_not_tell_what_is_installed(hub: Hub, client: Client):
    hub.repos["own/private"] = {"a.safetensors": ONE}
    client.resolve("hub:own/private", answer=True)
    agents = {agent for _, path, agent in hub.requests if "own/private" in path}
    assert agents
    assert not any("torch" in agent for agent in agents)


@needs_library
@pytest.mark.parametrize("reason", ["nobody there", "offline"])
def test_without_a_network_the_cache_is_used(hub: Hub, tmp_path: Path, reason: str):
    endpoint, offline = (hub.endpoint, "1") if reason == "offline" else ("http://127.0.0.1:9", "0")
    with contextlib.closing(Client(tmp_path, endpoint, HF_HUB_OFFLINE=offline)) as client:
        root = in_cache(client.cache, "own/cached", "0c" * 20, SHARDED)
        message = refused(client.resolve("hub:own/absent", answer=True), BadFileError)
        assert "cannot be fetched" in message
        assert "HF_HUB_OFFLINE" in message
        answer = client.resolve("hub:own/cached", answer=False)
        assert (answer["path"], answer["questions"]) == (str(root), [])
        assert "using what the cache has" in answer["logged"][0]
        refused(client.resolve("hub:own/cached/other.safetensors", answer=True), BadFileError)
    assert hub.asked("own/cached") == hub.asked("own/absent") == []


def test_commands_take_names_of_the_hub(hub: Hub, tmp_path: Path):
    """A pair and a target that are diffusers folders there: the same weights as from the folders themselves."""
    tiny.save_folder(tmp_path / "base", "sd1", tiny.base())
    tiny.save_folder(tmp_path / "tuned", "sd1", tiny.tuned())
    for name in ("base", "tuned"):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        hub.repos[f"them/{name}"] = {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files}

    def run(*arguments: object) -> None:
        command = [sys.executable, "-m", "lib_dpo", *map(str, arguments), "--yes"]
        subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment(tmp_path / "home", hub.endpoint), check=True)

    baked = {}
    for place in (f"{tmp_path}/", "hub:them/"):
        there = "hub" if place.startswith("hub:") else "here"
        offset, output = tmp_path / there / "offset.safetensors", tmp_path / there / "baked.safetensors"
        offset.parent.mkdir()
        run("offset", "--base", f"{place}base", "--tuned", f"{place}tuned", "-o", offset)
        run("bake", "--target", f"{place}base", "--offset", offset, "-o", output)
        baked[there] = load_file(output)
    assert baked["hub"].keys() == baked["here"].keys()
    assert all(torch.equal(tensor, baked["here"][key]) for key, tensor in baked["hub"].items())
