"""Outputs: complete under their name or not there at all, equal to what was added, and never over something else."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lib_dpo.errors import OutputError
from lib_dpo.files import writer
from lib_dpo.files.atomic import check_output, write_text_atomic
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.files.header import read_header, tensor_bytes
from lib_dpo.files.writer import SafetensorsWriter

TENSORS = {
    "f64": torch.arange(3, dtype=torch.float64),
    "f32": torch.arange(24.0).reshape(2, 3, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "bf16": torch.arange(7.0).bfloat16(),
    "f16": torch.arange(9.0).half(),
    "f8": torch.arange(5.0).to(torch.float8_e5m2),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(7, dtype=torch.int32),
    "none": torch.empty(3, 0),
}
METADATA = {"format": "pt", "ss_network_dim": "64", "dpo.note": 'é "quoted" \n日本'}


def writing(path: Path, **options: Any) -> SafetensorsWriter:
    return SafetensorsWriter(path, **{"expected_bytes": 1000, "max_tensors": 20, **options})


Hook = Callable[[SafetensorsWriter], None]


def save(
    path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    *,
    before: Hook = lambda out: None,
    after: Hook = lambda out: None,
    **options: Any,
) -> None:
    """Write a file, with something else that happens before or after the tensors."""
    with writing(path, **options) as out:
        before(out)
        for key, tensor in tensors.items():
            out.add(key, tensor)
        after(out)
        out.finish(metadata)


def same_as_added(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bool:
    """Whether the library reads what was added, byte for byte, and so do we."""
    with safe_open(str(path), framework="pt") as file:
        by_library = (file.metadata() or {}) == metadata
    loaded = load_file(path)
    with open_checkpoint(path) as checkpoint:
        return (
            by_library
            and checkpoint.metadata == metadata
            and list(checkpoint.infos) == list(tensors)
            and loaded.keys() == tensors.keys()
            and all(loaded[key].dtype == tensor.dtype for key, tensor in tensors.items())
            and all(loaded[key].shape == tensor.shape for key, tensor in tensors.items())
            and all(tensor_bytes(loaded[key]) == tensor_bytes(tensor) for key, tensor in tensors.items())
            and all(checkpoint.raw(key) == tensor_bytes(tensor) for key, tensor in tensors.items())
        )


def left_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# what is written


def test_the_library_reads_what_was_added(tmp_path: Path):
    save(tmp_path / "out.safetensors", TENSORS, METADATA)
    assert same_as_added(tmp_path / "out.safetensors", TENSORS, METADATA)
    assert left_in(tmp_path) == ["out.safetensors"]


def test_a_file_can_be_copied_from_its_bytes(tmp_path: Path):
    save(tmp_path / "one.safetensors", TENSORS, METADATA)
    with open_checkpoint(tmp_path / "one.safetensors") as source, writing(tmp_path / "two.safetensors") as out:
        for key, info in source.infos.items():
            out.add_raw(key, info.dtype, info.shape, source.raw(key))
        out.finish(source.metadata)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_dtypes_that_torch_lacks_are_copied(tmp_path: Path):
    path = tmp_path / "out.safetensors"
    with writing(path) as out:
        out.add_raw("packed", "F4", (2, 2), b"\x12\x34")
        out.finish({})
    assert open_checkpoint(path).raw("packed") == b"\x12\x34"


def test_a_file_without_tensors_or_metadata(tmp_path: Path):
    save(tmp_path / "out.safetensors", {}, {})
    assert same_as_added(tmp_path / "out.safetensors", {}, {})


@pytest.mark.parametrize(
    "room",
    [
        {"max_tensors": 0, "max_metadata_bytes": 0},  # too small: the data moves back
        {"max_tensors": 1, "max_metadata_bytes": 200},
        {"max_tensors": 500, "max_metadata_bytes": 5000},  # too large: the data moves forward
    ],
)
def test_header_room_of_any_size_does(tmp_path: Path, room: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "_PIECE", 48)  # moved in several pieces
    save(tmp_path / "out.safetensors", TENSORS, METADATA, **room)
    assert same_as_added(tmp_path / "out.safetensors", TENSORS, METADATA)


def test_a_small_file_has_no_empty_room_and_a_large_one_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = {"a": torch.zeros(1 << 18)}
    save(tmp_path / "tight.safetensors", tensors, {}, max_metadata_bytes=1 << 16)
    assert (tmp_path / "tight.safetensors").stat().st_size < 8 + 128 + (1 << 20)
    monkeypatch.setattr(writer, "_move", lambda *args: pytest.fail("moved"))
    save(tmp_path / "roomy.safetensors", tensors, {}, max_tensors=1, max_metadata_bytes=1 << 10)
    assert same_as_added(tmp_path / "roomy.safetensors", tensors, {})


def test_the_data_begins_at_a_multiple_of_8(tmp_path: Path):
    for length in range(8):
        path = tmp_path / f"{length}.safetensors"
        save(path, {"k" * (length + 1): torch.zeros(1)}, {}, max_tensors=length % 2)
        ((begin, _),) = read_header(path).spans.values()
        assert begin % 8 == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(st.text(min_size=1, max_size=9), st.lists(st.integers(0, 5), max_size=3), max_size=6),
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=99), max_size=4),
    max_tensors=st.integers(0, 8),
    max_metadata_bytes=st.integers(0, 999),
)
def test_any_keys_shapes_and_metadata(
    tmp_path: Path, shapes: dict[str, list[int]], metadata: dict[str, str], max_tensors: int, max_metadata_bytes: int
):
    shapes.pop("__metadata__", None)
    tensors = {key: torch.rand(shape) for key, shape in shapes.items()}
    room = {"max_tensors": max_tensors, "max_metadata_bytes": max_metadata_bytes}
    save(tmp_path / "out.safetensors", tensors, metadata, overwrite=True, **room)
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        assert checkpoint.metadata == metadata
        assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in tensors.items())
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


def test_nothing_is_kept_in_memory(tmp_path: Path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    count, size = 16, 4 << 20
    gc.collect()
    with writing(tmp_path / "out.safetensors", expected_bytes=count * size) as out:
        out.add("first", torch.ones(size // 4))
        before = anonymous()
        for number in range(count):
            out.add(str(number), torch.ones(size // 4))
        assert anonymous() - before < 4 * size
        out.finish({})


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_the_file_has_the_rights_of_any_other_new_file(tmp_path: Path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "out.safetensors", TENSORS, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.safetensors").stat().st_mode) == 0o640


def test_missing_folders_are_made(tmp_path: Path):
    save(tmp_path / "models" / "Lora" / "out.safetensors", TENSORS, {})
    assert (tmp_path / "models" / "Lora" / "out.safetensors").is_file()


def test_a_name_of_full_length_works(tmp_path: Path):
    path = tmp_path / ("n" * 243 + ".safetensors")
    save(path, TENSORS, {})
    assert left_in(tmp_path) == [path.name]


# all or nothing


def test_no_host_takes_the_unfinished_file_for_a_model(tmp_path: Path):
    with writing(tmp_path / "out.safetensors") as out:
        out.add("a", torch.ones(2))
        (name,) = left_in(tmp_path)
        assert name.startswith(".out.safetensors.")
        assert name.endswith(".part")


def interrupt(out: SafetensorsWriter) -> None:
    raise KeyboardInterrupt


def leave(out: SafetensorsWriter) -> None:
    out.__exit__(None, None, None)
    raise RuntimeError("left without finish")


@pytest.mark.parametrize(("how", "error"), [(interrupt, KeyboardInterrupt), (leave, RuntimeError)])
def test_leaving_early_leaves_nothing(tmp_path: Path, how: Hook, error: type[BaseException]):
    with pytest.raises(error):
        save(tmp_path / "new" / "folder" / "out.safetensors", TENSORS, {}, after=how)
    assert left_in(tmp_path) == []


def test_leaving_early_keeps_the_file_that_was_to_be_overwritten(tmp_path: Path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        save(path, TENSORS, {}, after=interrupt, overwrite=True)
    assert (left_in(tmp_path), path.read_bytes()) == ([path.name], b"before")


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path):
    path = tmp_path / "out.safetensors"
    with file_size_limit(1 << 20), pytest.raises(OutputError, match="cannot be written") as error:
        save(path, {str(number): torch.ones(1 << 16) for number in range(9)}, {})
    assert str(path) in str(error.value)
    assert left_in(tmp_path) == []


class FullDisk:
    """A file on a disk that becomes full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def full_after(room: int) -> Hook:
    def replace(out: SafetensorsWriter) -> None:
        out._output.file = FullDisk(out._output.file, room)  # type: ignore[assignment]

    return replace


@pytest.mark.parametrize("room", [0, 100, 1000])  # full at the first tensor, at the second, at the header
def test_a_full_disk_leaves_nothing(tmp_path: Path, room: int):
    tensors = {str(number): torch.ones(15) for number in range(4)}
    with pytest.raises(OutputError, match="disk is full"):
        save(tmp_path / "out.safetensors", tensors, {"note": "n" * 1000}, before=full_after(room))
    assert left_in(tmp_path) == []


def test_nothing_can_be_finished_after_a_failed_write(tmp_path: Path):
    with writing(tmp_path / "out.safetensors") as out:
        file = out._output.file
        full_after(0)(out)
        with pytest.raises(OutputError):
            out.add("a", torch.ones(9))
        out._output.file = file
        with pytest.raises(ValueError, match="closed file"):
            out.finish({})
    assert left_in(tmp_path) == []


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(9)
        file.write(b"?")


def change_a_key(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"f16"', b'"f61"'))


@pytest.mark.parametrize("damage", [cut_off, overwrite_header, change_a_key])
def test_a_file_that_reads_back_differently_is_not_kept(
    tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
):
    def damage_when_synced(out: SafetensorsWriter) -> None:
        monkeypatch.setattr(os, "fsync", lambda number: damage(out._output.part))

    with pytest.raises(OutputError, match="check the disk"):
        save(tmp_path / "out.safetensors", TENSORS, METADATA, before=damage_when_synced)
    assert left_in(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path):
    left, of_another_output = ".out.safetensors.0123abcd.part", ".in.safetensors.0123abcd.part"
    for name in (left, of_another_output):
        (tmp_path / name).write_bytes(b"")
    with writing(tmp_path / "out.safetensors") as other:  # two write one name: the second refuses to replace the first
        save(tmp_path / "out.safetensors", TENSORS, {})
        assert left_in(tmp_path) == sorted(["out.safetensors", of_another_output, other._output.part.name])
        with pytest.raises(OutputError, match="exists already"):
            other.finish({})
    assert left_in(tmp_path) == sorted(["out.safetensors", of_another_output])


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open, and needs no locks for that")
def test_what_was_left_is_removed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else its maker could lock it between the look and the removal, and would write to a file without a name."""
    import fcntl

    left, held, unlink = tmp_path / ".out.safetensors.0123abcd.part", [], Path.unlink

    def watched(path: Path, *args: Any, **options: Any) -> None:
        if path == left:
            with path.open("r+b") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(path)
        unlink(path, *args, **options)

    left.write_bytes(b"")
    monkeypatch.setattr(Path, "unlink", watched)
    save(tmp_path / "out.safetensors", TENSORS, {})
    assert held == [left]
    assert left_in(tmp_path) == ["out.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open, and needs no locks for that")
def test_where_files_cannot_be_locked_a_day_must_have_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    old, fresh = ".out.safetensors.0123abcd.part", ".out.safetensors.1123abcd.part"
    for name, age in ((old, 90_000), (fresh, 3600)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    save(tmp_path / "out.safetensors", TENSORS, {})
    assert left_in(tmp_path) == sorted(["out.safetensors", fresh])


# refusals


def test_an_existing_file_is_kept(tmp_path: Path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(OutputError, match="exists already"):
        writing(path)
    assert path.read_bytes() == b"before"


def test_an_existing_file_is_replaced_on_demand(tmp_path: Path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"before")
    save(path, TENSORS, METADATA, overwrite=True)
    assert same_as_added(path, TENSORS, METADATA)


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not hard_links:  # as on exFAT
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "out.safetensors"
    with pytest.raises(OutputError, match="exists already"):
        save(path, TENSORS, {}, after=lambda out: path.write_bytes(b"of somebody else") and None)
    assert (left_in(tmp_path), path.read_bytes()) == ([path.name], b"of somebody else")


def test_file_systems_without_hard_links_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "out.safetensors", TENSORS, METADATA)
    assert same_as_added(tmp_path / "out.safetensors", TENSORS, METADATA)
    assert left_in(tmp_path) == ["out.safetensors"]


def test_a_full_disk_is_noticed_beforehand(tmp_path: Path):
    with pytest.raises(OutputError, match=r"needs 1,000,000,001\.\d MB, [\d,]+\.\d MB are free"):
        save(tmp_path / "new" / "out.safetensors", TENSORS, {}, expected_bytes=10**15)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", ["out", "out.ckpt", "out.safetensors.txt"])
def test_other_names_are_refused(tmp_path: Path, name: str):
    with pytest.raises(OutputError, match=r"ends in \.safetensors"):
        writing(tmp_path / name)


def test_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        writing(tmp_path / "out.safetensors", overwrite=True)


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "models").write_bytes(b"")
    with pytest.raises(OutputError, match="no folder that may be written to"):
        writing(tmp_path / "models" / "Lora" / "out.safetensors")


def test_a_folder_without_rights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not stop root
    with pytest.raises(OutputError, match="no folder that may be written to"):
        check_output(tmp_path / "out.safetensors", overwrite=False)


@pytest.mark.parametrize("kind", ["same", "symlink", "hard link", "roundabout"])
def test_an_input_is_never_the_output(tmp_path: Path, kind: str):
    source = tmp_path / "in.safetensors"
    source.write_bytes(b"")
    output = {"same": source, "roundabout": tmp_path / "x" / ".." / "in.safetensors"}.get(kind, tmp_path / "out.safetensors")
    (tmp_path / "x").mkdir()
    if kind == "symlink":
        output.symlink_to(source)
    if kind == "hard link":
        os.link(source, output)
    with pytest.raises(OutputError, match="is one of the inputs"):
        check_output(output, overwrite=True, inputs=[tmp_path / "none.safetensors", source])
    check_output(tmp_path / "other.safetensors", overwrite=False, inputs=[source])


def test_a_dangling_link_is_a_file_that_exists(tmp_path: Path):
    (tmp_path / "out.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "out.safetensors", overwrite=False)


@pytest.mark.parametrize(
    ("key", "dtype", "shape", "data"),
    [("a", "F32", (1,), bytes(4)), ("__metadata__", "F32", (1,), bytes(4)), ("b", "F32", (2,), bytes(4)), ("b", "X", (), b"")],
)
def test_wrong_use_is_an_error_of_the_program(tmp_path: Path, key: str, dtype: str, shape: tuple[int, ...], data: bytes):
    with writing(tmp_path / "out.safetensors") as out:
        out.add("a", torch.ones(1))
        with pytest.raises(ValueError, match=r"added already|bytes, expected|unknown dtype"):
            out.add_raw(key, dtype, shape, data)


@pytest.mark.parametrize("metadata", [{"rank": 64}, {1: "x"}, {"none": None}])
def test_metadata_is_text_only(tmp_path: Path, metadata: Any):
    with writing(tmp_path / "out.safetensors") as out, pytest.raises(TypeError, match="expected str"):
        out.finish(metadata)
    assert left_in(tmp_path) == []


def test_metadata_beyond_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "MAX_HEADER_BYTES", 5000)
    with pytest.raises(OutputError, match="write less metadata"), writing(tmp_path / "out.safetensors") as out:
        out.finish({"long": "x" * 6000})
    assert left_in(tmp_path) == []


# text


def test_text_is_written_whole(tmp_path: Path):
    path = tmp_path / "new" / "figures.json"
    for text in ("energy kept: 0.99\n", "größer"):
        write_text_atomic(path, text)
        assert path.read_bytes() == text.encode()
    assert left_in(tmp_path) == ["new", "new/figures.json"]


def test_text_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text_atomic(tmp_path / "figures.json", "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_text_atomic(tmp_path / "figures.json", "after")
    assert (left_in(tmp_path), (tmp_path / "figures.json").read_text()) == (["figures.json"], "before")
