"""Files and names made to do harm: refused, or answered, within a second and 200 MB, and nothing outside is read or written.

Time and memory are measured in a process of its own, for each file apart; `-rP` shows the figures. A busy machine may take
ten times as long.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import webui_files
from fastapi import FastAPI
from fastapi.testclient import TestClient
from webui_files import fake

from lib_dpo.webui.api import PREFIX, add_routes
from lib_dpo.webui.session import Session

MB, SECONDS = 200, 10.0
READS_PICKLES = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads and resets peaks in /proc")

MEASURE = """
import json, sys, time
from lib_dpo.errors import DpoError
from lib_dpo.families.model import open_model
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.recipe import is_bake
from lib_dpo.operations.inspect import inspect
from pathlib import Path

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def read(path):
    with open_checkpoint(path) as checkpoint:
        for key in checkpoint.infos:
            checkpoint.read(key)

sound, *paths = map(Path, sys.argv[1:])
ways = (read, open_model, open_offset, inspect, is_bake)
for path in (sound, *paths):
    for way in ways:
        open("/proc/self/clear_refs", "w").write("5")  # the peak is what is held now
        before, start, refusal = kilobytes("VmRSS"), time.process_time(), ""
        try:
            way(path)
        except DpoError as error:
            refusal = f"{type(error).__name__}: {error}"
        seconds, mb = time.process_time() - start, (kilobytes("VmHWM") - before) / 1000
        print(json.dumps([path.name, way.__name__, refusal, seconds, mb]), flush=True)
"""


def tensors_file(entries: Any, data: bytes = b"") -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def many(count: int, name: str = "k{}") -> bytes:
    rest = json.dumps(entry([0], [0, 0]))
    return tensors_file(("{" + ",".join(f'"{name.format(number)}":{rest}' for number in range(count)) + "}").encode())


def archive(members: dict[str, bytes | int], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive as torch's, of contents or of so many MiB of zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method, compresslevel=1) as found:
        for name, content in members.items():
            with found.open(f"archive/{name}", "w", force_zip64=True) as member:
                for piece in [content] if isinstance(content, bytes) else [bytes(1 << 20)] * content:
                    member.write(piece)
    return stream.getvalue()


def lying_archive() -> bytes:
    """One whose pickle inflates to 400 MiB, though it says that it has a hundred bytes."""
    whole = archive({"data.pkl": 400, "version": b"3\n"})
    place = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"version"))
    place = whole.index(b"PK\x01\x02") if place < 0 else place
    assert whole[place : place + 4] == b"PK\x01\x02"
    return whole[: place + 24] + struct.pack("<I", 100) + whole[place + 28 :]


SMALL = pickle.dumps({"a": 1}, protocol=2)


def old_torch(content: bytes) -> bytes:
    """A file as torch wrote them before 1.6: five pickles in a row."""
    before = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(each, protocol=2) for each in before) + content + pickle.dumps(["0"], protocol=2)


def called(name: str, arguments: bytes) -> bytes:
    """A pickle of {"a": name(arguments)}; the arguments are instructions."""
    module, _, function = name.rpartition(".")
    return b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{function}\n".encode() + b"(" + arguments + b"tRs."


BIG = b"\x8a\x05\x00\x00\x00\x00\x02"  # LONG1: 2**33


def as_zip(content: bytes) -> bytes:
    return archive({"data.pkl": content, "byteorder": b"little", "version": b"3\n"}, zipfile.ZIP_STORED)


# what each file is; those named in REFUSED_NOT are answered
FILES: dict[str, Callable[[], bytes]] = {
    "header larger than the file.safetensors": lambda: (15_000_000).to_bytes(8, "little") + b'{"a":' + b" " * 1000,
    "header of 2^63.safetensors": lambda: (1 << 63).to_bytes(8, "little") + b"{}",
    "tags of a million pictures.safetensors": lambda: tensors_file(
        b'{"__metadata__":{"ss_tag_frequency":"' + rb"{\"a, b\": 1}, " * 2_000_000 + b'"}}'
    ),
    "million keys.safetensors": lambda: many(1_000_000),
    "million short keys.safetensors": lambda: tensors_file(b"{" + b",".join(b'"%x":0' % n for n in range(1_000_000)) + b"}"),
    "hundred thousand keys.safetensors": lambda: many(100_000, "lora_unet_{}.lora_up.weight"),
    "ten thousand keys.safetensors": lambda: many(10_000, "model.diffusion_model.input_blocks.{}.0.weight"),
    "million empty lists.safetensors": lambda: tensors_file(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
    "deep.safetensors": lambda: tensors_file(b'{"a":' * 400_000),
    "name of a megabyte.safetensors": lambda: tensors_file({"a." * 500_000: entry([1], [0, 4])}, bytes(4)),
    "name to backtrack in.safetensors": lambda: tensors_file({".lora_a" * 140 + "!": entry([1], [0, 4])}, bytes(4)),
    "2^40 x 2^40.safetensors": lambda: tensors_file({"a": entry([1 << 40, 1 << 40], [0, 4])}, bytes(4)),
    "2^32 x 2^32.safetensors": lambda: tensors_file({"a": entry([1 << 32, 1 << 32], [0, 0])}),
    "2^63 + 1.safetensors": lambda: tensors_file({"a": entry([(1 << 63) + 1, 2], [0, 8])}, bytes(8)),
    "0 x 2^60.safetensors": lambda: tensors_file({"a": entry([0, 1 << 60], [0, 0])}),
    "wide letters.safetensors": lambda: tensors_file(
        b'{"__metadata__":{"a":"' + b"x" * 15_900_000 + "\U0001f600".encode() + b'"}}'
    ),
    "recipe within recipe.safetensors": lambda: tensors_file(
        {"__metadata__": {"sd_merge_recipe": "[" * 300_000, "sd_merge_models": '{"a":' * 80_000}, "a": entry([1], [0, 4])},
        bytes(4),
    ),
    "bomb in the pickle.ckpt": lambda: archive({"data.pkl": 400, "version": b"3\n"}),
    "bomb that lies.ckpt": lying_archive,
    "bomb in the numbers.ckpt": lambda: archive(
        {"data.pkl": _storage(100 << 20), "byteorder": b"little", "data/0": 400, "version": b"3\n"}
    ),
    "bomb of code.pt": lambda: archive({"constants.pkl": SMALL, "data.pkl": 400, "code/a.py": 400, "version": b"3\n"}),
    "bytearray of 8 GB.ckpt": lambda: as_zip(called("builtins.bytearray", BIG)),
    "bytearray of 8 GB, old.ckpt": lambda: old_torch(called("__builtin__.bytearray", BIG)),
    "memory as it lies.ckpt": lambda: as_zip(called("torch.FloatTensor", BIG)),
    "storage as it lies.ckpt": lambda: as_zip(called("torch.storage.UntypedStorage", BIG)),
    "numbers that are not there.pt": lambda: old_torch(_storage(1 << 33, None)),
    "marks.pt": lambda: b"\x80\x02" + b"(" * 3_000_000 + b"t" * 3_000_000 + b".",
    "place in the memo.pt": lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
    "text of 4 GB.pt": lambda: b"\x80\x02X\xff\xff\xff\xffabc.",
    "hundred thousand members.ckpt": lambda: as_zip_with({f"data/{number}": b"" for number in range(100_000)}),
    "tar of before 0.1.pt": lambda: _tar(),
}  # fmt: skip
ANSWERED = {
    "ten thousand keys.safetensors", "name to backtrack in.safetensors", "recipe within recipe.safetensors",
    "wide letters.safetensors", "tags of a million pictures.safetensors",
}  # fmt: skip


def as_zip_with(members: dict[str, bytes | int]) -> bytes:
    return archive({"data.pkl": SMALL, "version": b"3\n", **members}, zipfile.ZIP_STORED)


def _storage(count: int, *view: None) -> bytes:
    """The pickle of {"a": a tensor of so many float32}, of which the archive is to hold the numbers."""

    here = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count, *view) if obj is here else None

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (here, 0, (count,), (1,), False, {})

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"a": Tensor()})
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as found:
        for name in ("storages", "tensors", "pickle", "../../escaped"):
            info = tarfile.TarInfo(name)
            info.size = len(SMALL)
            found.addfile(info, io.BytesIO(SMALL))
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        found.addfile(link)
    return stream.getvalue()


@dataclass(frozen=True)
class Seen:
    """What became of one way to read a file."""

    way: str
    refusal: str
    seconds: float
    mb: float


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    """All hostile files, each read in every way, by name."""
    folder = tmp_path_factory.mktemp("hostile")
    sound = tiny.save(folder / "sound.safetensors", {"a": torch.ones(2)})
    for name, make in FILES.items():
        (folder / name).write_bytes(make())
    paths = [str(folder / name) for name in FILES]
    before = sorted(folder.rglob("*"))
    command = [sys.executable, "-c", MEASURE, str(sound), *paths]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(folder.rglob("*")) == before, "something was written"
    found: dict[str, list[Seen]] = {}
    for line in done.stdout.splitlines():
        name, *row = json.loads(line)
        found.setdefault(name, []).append(Seen(*row))
    return found


@needs_linux
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_costs_little(seen: dict[str, list[Seen]], name: str):
    longest, largest = max(row.seconds for row in seen[name]), max(row.mb for row in seen[name])
    print(f"{name}: {longest:.2f} s, {largest:.0f} MB: {seen[name][0].refusal[:150]}")
    assert longest < SECONDS
    assert largest < MB
    refusals = {row.way: row.refusal for row in seen[name] if row.way != "is_bake"}
    assert all(len(text) < 4000 and "\n" not in text for text in refusals.values())
    if name in ANSWERED:
        assert refusals["inspect"] == ""
    else:
        assert all(name in text for text in refusals.values()), refusals
    if name.endswith((".ckpt", ".pt")):
        assert READS_PICKLES or all("torch 2.6" in text for text in refusals.values())


@needs_linux
def test_the_most_is_asked_for(seen: dict[str, list[Seen]]):
    rows = [(row.seconds, row.mb, name, row.way) for name, own in seen.items() for row in own]
    print("longest", max(rows), "largest", max(rows, key=lambda row: row[1]))
    assert len(rows) == 5 * (1 + len(FILES))


# ---- pickles that execute ----


class Calls:
    """A pickle of this calls a function with arguments where it is opened."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def _executing(trap: Path) -> dict[str, Any]:
    code = f"__import__('os').mkdir({str(trap)!r})"
    return {
        "system": Calls(os.system, f"mkdir {trap}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "nested": Calls(functools.reduce, max, [Calls(eval, code), 1]),
        "in a key": {Calls(eval, code): 1},
        "subprocess": Calls(subprocess.check_call, ["mkdir", str(trap)]),
        "torch.load": Calls(torch.load, str(trap.with_name("second.pt")), None, None),
        "torch.hub": Calls(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
        "in an OrderedDict": Calls(type(torch.nn.Linear(1, 1).state_dict()), [("a", Calls(eval, code))]),
        "as a class": Calls(type, "Any", (), {}),
    }


@pytest.mark.parametrize("way", ["zip", "old", "pickle"])
def test_pickles_that_execute_do_not(tmp_path: Path, way: str):
    trap, path = tmp_path / "it_ran", tmp_path / "a.ckpt"
    for name, content in _executing(trap).items():
        if way == "pickle":
            path.write_bytes(pickle.dumps({"a": content}, protocol=2))
        else:
            torch.save({"state_dict": {"a": torch.ones(2), "b": content}}, path, _use_new_zipfile_serialization=way == "zip")
        code = tiny.run_openly("inspect", path)
        assert code == 2, name
        assert not trap.exists(), name


@pytest.mark.skipif(not READS_PICKLES, reason="torch before 2.6 reads no pickles safely")
def test_pickles_of_torch_pass(tmp_path: Path):
    """Beside state dicts: parameters, sparse and quantised tensors are refused by what they are, not as code."""
    path = tmp_path / "a.ckpt"
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    for content in (model.state_dict(), {"state_dict": dict(model.named_parameters()), "optimizer": optimizer.state_dict()}):
        for is_zip in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=is_zip)
            assert tiny.run_openly("inspect", path) == 0


# ---- names that lead out of the folder ----

NAMES = [
    "../../x", "..\\..\\x", "/tmp/x", "C:\\x", "\\\\server\\share\\x", "a/b", "..", ".", ".hidden", "a\0b", "nul", "aux.txt",
    "COM1.safetensors", "con .x", "CONOUT$", "x" * 5000, "a\nb", "a\u202eb", "x:stream", "~/x", "%2e%2e/x", "\ud800", " ",
    "x.", "*", "日" * 60,
]  # fmt: skip


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("names")
    return webui_files.open_session(webui_files.make(folder / "made"), folder / "models")


@pytest.fixture
def client(session: Session) -> TestClient:
    app = FastAPI()
    add_routes(app, session)
    return TestClient(app)


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:20] for name in NAMES])
def test_names_that_lead_out_write_nothing(session: Session, client: TestClient, name: str):
    folder = fake(session).folder.parent
    before = tiny.snapshot(folder)
    pair = {"base": "base", "reference": "dpo-sd1"}
    bodies = [
        ("extract", {**pair, "name": name, "rank": 1}),
        ("offset", {**pair, "name": name}),
        ("save", {"name": name, "offset": "xl"}),
        ("bake", {"offset": name}),
        ("analyse", {"base": name, "reference": "dpo-sd1"}),
        ("analyse", {"base": "base", "reference": name}),
        ("compat", {**pair, "target": name}),
        ("blind/start", {"offset": name}),
    ]
    for allowed in (False, True):  # where paths may be named, only files that are there
        fake(session).paths_allowed = allowed
        for route, body in bodies:
            answer = client.post(f"{PREFIX}/{route}", content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code in (404, 422), (route, answer.text)
            assert str(folder) not in answer.text
        if name.isprintable():
            assert client.get(f"{PREFIX}/inspect", params={"name": name}).status_code in (404, 422)
    fake(session).paths_allowed = False
    assert tiny.snapshot(folder) == before


# ---- links that lead out of the folder ----


@pytest.fixture
def own(session: Session, tmp_path: Path) -> Session:
    return webui_files.open_session(fake(session).folder, tmp_path / "models")


def test_a_link_is_replaced_and_never_written_through(own: Session, tmp_path: Path):
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    app = FastAPI()
    add_routes(app, own)
    client = TestClient(app)
    link = own.host.lora_dir / "evil.safetensors"
    link.symlink_to(outside)
    body = {"base": "base", "reference": "dpo-sd1", "name": "evil", "rank": 1}
    refused = client.post(f"{PREFIX}/extract", json=body)
    assert (refused.status_code, outside.read_text()) == (422, "secret")
    assert "secret" not in client.get(f"{PREFIX}/inspect", params={"name": "evil"}).text
    assert client.post(f"{PREFIX}/extract", json={**body, "overwrite": True}).status_code == 200
    assert outside.read_text() == "secret"
    assert link.is_file()
    assert not link.is_symlink()


@pytest.mark.newest
def test_links_in_a_circle_are_walked_once(own: Session, tmp_path: Path):
    for number in range(40):  # 40 links three folders deep are 2.6 million places
        (own.host.reference_dir / f"again {number}").symlink_to(own.host.reference_dir, target_is_directory=True)
    (own.host.reference_dir / "to itself.safetensors").symlink_to(own.host.reference_dir / "to itself.safetensors")
    (own.host.reference_dir / "up").symlink_to(tmp_path.parent, target_is_directory=True)
    assert "dpo-sd1" in [entry.name for entry in own.library.references()]
