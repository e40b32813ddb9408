"""Checkpoints: what is read is what was written, and what is damaged, foreign or unsafe is refused in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lib_dpo.errors import BadFileError, BadTensorError, DpoError, NoMemoryError, UnsafeFileError
from lib_dpo.files import hashes
from lib_dpo.files.checkpoint import (
    TensorInfo,
    choose_weights,
    dtype_name,
    file_sha256,
    open_checkpoint,
    sha256_in_background,
    torch_dtype,
)
from lib_dpo.files.header import tensor_bytes

READS_PICKLES = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
needs_pickles = pytest.mark.skipif(not READS_PICKLES, reason="torch before 2.6 reads no pickles safely")
UNET = "diffusion_pytorch_model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("LOCALAPPDATA", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    return hashes.user_cache("hashes.json")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "f64": torch.randn(3, dtype=torch.float64, generator=generator),
        "i64": torch.arange(77)[None],
        "f32": torch.randn(4, 3, 3, 3, generator=generator),
        "bf16": torch.randn(5, 7, generator=generator).bfloat16(),
        "f16": torch.randn(8, 2, generator=generator).half(),
        "f8": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and tensor_bytes(one) == tensor_bytes(other)


def safetensors(entries: Any, data: bytes = b"") -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def one_line(error: pytest.ExceptionInfo[DpoError], path: Path) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 500 + len(str(path))
    return text


class Runs:
    """A pickle of this runs code where it is opened: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


# reading


def test_reads_back_what_the_library_wrote(tmp_path: Path):
    path = tmp_path / "dreamshaper_8.safetensors"
    save_file(tensors(), path, metadata={"format": "pt", "ss_é": "日本"})
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.name, checkpoint.format, checkpoint.files) == ("dreamshaper_8", "safetensors", (path,))
        assert checkpoint.metadata == {"format": "pt", "ss_é": "日本"}
        assert checkpoint.infos.keys() == tensors().keys()
        assert checkpoint.infos["bf16"] == TensorInfo("BF16", (5, 7), 70)
        for key, tensor in tensors().items():
            assert equal(checkpoint.read(key), tensor)
            assert checkpoint.raw(key) == tensor_bytes(tensor)
            assert checkpoint.infos[key].nbytes == tensor.numel() * tensor.element_size()
        with pytest.raises(KeyError):
            checkpoint.read("missing")


def test_infos_are_in_data_order(tmp_path: Path):
    entries = {"second": entry(offsets=[8, 16]), "first": entry(offsets=[0, 8])}
    path = write(tmp_path / "a.safetensors", safetensors(entries, bytes(16)))
    assert list(open_checkpoint(path).infos) == ["first", "second"]


def test_tensors_outlive_the_checkpoint(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    checkpoint = open_checkpoint(path)
    tensor, raw = checkpoint.read("f32"), checkpoint.raw("f32")
    checkpoint.close()
    del checkpoint
    assert torch.equal(tensor, tensors()["f32"])
    assert raw == tensor_bytes(tensor)


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file(tensors(), path)
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        checkpoint.read("f32").zero_()
        with pytest.raises(TypeError):
            checkpoint.raw("f32")[0] = 1
    assert path.read_bytes() == before


def test_reads_tensors_at_odd_places(tmp_path: Path):
    values = torch.randn(5, dtype=torch.float64)
    entries = {"odd": entry("U8", [1], [0, 1]), "f64": entry("F64", [5], [1, 41])}
    header = json.dumps(entries).encode()
    path = write(
        tmp_path / "a.safetensors", safetensors(header + b" " * (len(header) % 2), b"\1" + bytes(tensor_bytes(values)))
    )
    assert torch.equal(open_checkpoint(path).read("f64"), values)


def test_copies_dtypes_that_torch_lacks(tmp_path: Path):
    path = write(tmp_path / "a.safetensors", safetensors({"packed": entry("F4", [4], [0, 2])}, b"\x12\x34"))
    checkpoint = open_checkpoint(path)
    assert checkpoint.raw("packed") == b"\x12\x34"
    with pytest.raises(BadTensorError, match="'packed' is F4"):
        checkpoint.read("packed")


def test_dtype_names_are_the_librarys():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        header = json.loads(save({"x": torch.zeros(1, dtype=dtype)})[8:].partition(b"}")[0] + b"}}")
        assert dtype_name(dtype) == header["x"]["dtype"]
        assert torch_dtype(dtype_name(dtype)) is dtype
    assert torch_dtype("F4") is None


def test_memory_stays_file_backed(tmp_path: Path):
    psutil = pytest.importorskip("psutil")
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    count, size = 16, 4 << 20
    path = tmp_path / "a.safetensors"
    entries = {f"t{i}": entry("F16", [size // 2], [i * size, (i + 1) * size]) for i in range(count)}
    header = json.dumps(entries).encode()
    write(path, safetensors(header.ljust(-(-len(header) // 8) * 8), bytes(count * size)))
    before, mapped = anonymous(), psutil.Process().memory_info().rss
    with open_checkpoint(path) as checkpoint:
        kept = [checkpoint.read(key) for key in checkpoint.infos]
        assert all(not tensor.view(torch.int16).max() for tensor in kept)  # touches every page
        assert psutil.Process().memory_info().rss - mapped > count * size / 2
        assert anonymous() - before < count * size / 4


# damaged files

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "shorter than its length": (b"\x10\0\0", "has 3 bytes"),
    "no header": (bytes(8), "has 8 bytes"),
    "header of no bytes": (bytes(8) + b"{}" * 9, "header of 0 bytes"),
    "header beyond the end": (safetensors({"a": entry()}, bytes(8))[:40], "announces a header"),
    "header bomb": ((10**12).to_bytes(8, "little") + b"{" * 99, "header of 1000000000000 bytes"),
    "header not JSON": (safetensors(b"{'a': 1}"), "no valid JSON"),
    "header not UTF-8": (safetensors(b'{"\xff": 1}'), "no valid JSON"),
    "header too deep": (safetensors(b"[" * 100_000), "no valid JSON"),
    "header with half a letter": (safetensors(b'{"\\ud800": {}}'), "no valid JSON"),
    "header with an endless number": (safetensors(b'{"a": %s}' % (b"9" * 5000)), ""),
    "header no object": (safetensors([1]), "JSON list"),
    "key twice": (safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "appears twice"),
    "entry no object": (safetensors({"a": 1}), "the entry of 'a'"),
    "entry without dtype": (safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "the entry of 'a'"),
    "entry without offsets": (safetensors({"a": {"shape": [2], "dtype": "F32"}}, bytes(8)), "the entry of 'a'"),
    "three offsets": (safetensors({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "the entry of 'a'"),
    "negative offset": (safetensors({"a": entry(offsets=[-8, 0])}, bytes(8)), "the entry of 'a'"),
    "offset with a fraction": (safetensors({"a": entry(offsets=[0, 8.0])}, bytes(8)), "the entry of 'a'"),
    "negative shape": (safetensors({"a": entry(shape=[-2])}, bytes(8)), "the entry of 'a'"),
    "truth as a shape": (safetensors({"a": entry(shape=[True, 2])}, bytes(8)), "the entry of 'a'"),
    "shape beyond counting": (safetensors({"a": entry(shape=[0, 1 << 60], offsets=[0, 0])}), "impossible shape"),
    "shape of 100 dimensions": (safetensors({"a": entry(shape=[1] * 100, offsets=[0, 4])}, bytes(4)), "impossible"),
    "unknown dtype": (safetensors({"a": entry("F33")}, bytes(8)), "unknown dtype 'F33'"),
    "half a byte": (safetensors({"a": entry("F4", [3], [0, 2])}, bytes(2)), "whole bytes"),
    "extent too small": (safetensors({"a": entry(shape=[3])}, bytes(8)), "has 8 bytes, expected 12"),
    "extent backwards": (safetensors({"a": entry(offsets=[8, 0])}, bytes(8)), "has -8 bytes"),
    "hole": (safetensors({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "begins at byte 12"),
    "overlap": (safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "begins at byte 4"),
    "beyond the end": (safetensors({"a": entry(offsets=[0, 8])}, bytes(7)), "bytes, expected"),
    "more than announced": (safetensors({"a": entry()}, bytes(9)), "bytes, expected"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)), "metadata"),
    "metadata no object": (safetensors({"__metadata__": "x", "a": entry()}, bytes(8)), "metadata"),
    "pickle": (b"\x80\x02}q\0." + bytes(9), "a Python pickle"),
    "zip": (b"PK\x03\x04" + bytes(30), "a zip archive"),
    "web page": (b"<!DOCTYPE html><html>", "a web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git-lfs"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, case: str):
    data, message = DAMAGED[case]
    path = write(tmp_path / "bad.safetensors", data)
    with pytest.raises(BadFileError) as error:
        open_checkpoint(path)
    assert message in one_line(error, path)


def test_every_truncation_is_refused(tmp_path: Path):
    data = save({"a": torch.arange(6.0), "b": torch.zeros(2)}, metadata={"k": "v"})
    for length in range(len(data)):
        with pytest.raises(BadFileError):
            open_checkpoint(write(tmp_path / "a.safetensors", data[:length]))


VALID = save({"model.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).half()}, metadata={"format": "pt"})
IN_TMP = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path) -> str:
    """The message of the refusal, or nothing where all of it can be read."""
    try:
        checkpoint = open_checkpoint(path)
        for key, info in checkpoint.infos.items():
            assert len(checkpoint.raw(key)) == info.nbytes
            if torch_dtype(info.dtype):
                assert tuple(checkpoint.read(key).shape) == info.shape
    except BadFileError as error:
        return str(error)
    return ""


@IN_TMP
@given(place=st.integers(0, len(VALID) - 1), byte=st.integers(0, 255))
def test_a_changed_byte_reads_or_is_refused(tmp_path: Path, place: int, byte: int):
    path = write(tmp_path / "a.safetensors", VALID[:place] + bytes([byte]) + VALID[place + 1 :])
    assert "\n" not in refusal(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 64) | st.floats() | st.sampled_from(["F32", "F4", "", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
odd_headers = st.dictionaries(
    st.text(max_size=8) | st.just("__metadata__"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "F4", "C64", "F16"]) | json_values,
            "shape": st.lists(st.integers(0, 4), max_size=4) | json_values,
            "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | json_values,
        }
    )
    | json_values,
    max_size=4,
)


@IN_TMP
@given(header=odd_headers, data=st.binary(max_size=16))
def test_odd_headers_read_or_are_refused(tmp_path: Path, header: Any, data: bytes):
    assert "\n" not in refusal(write(tmp_path / "a.safetensors", safetensors(header, data)))


@IN_TMP
@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 3), max_size=3), max_size=5))
def test_any_keys_and_shapes_are_read(tmp_path: Path, shapes: dict[str, list[int]]):
    shapes.pop("__metadata__", None)
    written = {key: torch.rand(shape) for key, shape in shapes.items()}
    save_file(written, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.infos.keys() == written.keys()
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in written.items())


# paths


def test_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(BadFileError, match="does not exist"):
        open_checkpoint(tmp_path / "none.safetensors")


def test_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(BadFileError, match="is empty"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["a\0b.safetensors", "n" * 5000 + ".safetensors"])
def test_impossible_names_are_refused(tmp_path: Path, name: str):
    with pytest.raises(BadFileError):
        open_checkpoint(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(BadFileError, match="no regular file"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.safetensors", VALID)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
    with pytest.raises(BadFileError, match="Permission denied"):
        open_checkpoint(path)


def test_memory_that_runs_out_is_not_called_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.safetensors", VALID)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(NoMemoryError, match="out of memory; close other programs"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str):
    with pytest.raises(BadFileError, match=r"expected \.safetensors"):
        open_checkpoint(write(tmp_path / name, VALID))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("dreamshaper_8.safetensors", "dreamshaper_8"),
        ("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0"),
        ("dpo-sd1.5-text2image-v1/unet/diffusion_pytorch_model.safetensors", "dpo-sd1.5-text2image-v1"),
        ("dpo-sdxl/unet/diffusion_pytorch_model.fp16.safetensors", "dpo-sdxl"),
        ("dpo-sdxl/model.safetensors", "dpo-sdxl"),
        (f"models--mhdang--dpo-v1/snapshots/{'0a' * 20}/unet/{UNET}.safetensors", "dpo-v1"),
    ],
)
def test_names_tell_whose_weights_these_are(tmp_path: Path, path: str, name: str):
    assert open_checkpoint(write(tmp_path / path, VALID)).name == name


def test_relative_paths_have_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "dpo" / "unet" / f"{UNET}.safetensors", VALID)
    monkeypatch.chdir(tmp_path / "dpo" / "unet")
    assert open_checkpoint(".").name == open_checkpoint(f"{UNET}.safetensors").name == "dpo"


# diffusers folders


def diffusers_folder(root: Path) -> Path:
    write(root / "model_index.json", b"{}")
    write(root / "unet" / f"{UNET}.safetensors", save({"conv_in.weight": torch.ones(2)}, metadata={"format": "pt"}))
    write(root / "text_encoder" / "model.safetensors", save({"text_model.x": torch.ones(3)}))
    write(root / "text_encoder_2" / "model.fp16.safetensors", save({"text_model.x": torch.ones(4).half()}))
    write(root / "vae" / f"{UNET}.safetensors", save({"decoder.x": torch.ones(5)}))
    write(root / "vae" / f"{UNET}.fp16.safetensors", save({"decoder.x": torch.ones(5).half()}))
    write(root / "scheduler" / "scheduler_config.json", b"{}")
    return root


def sharded_folder(root: Path) -> Path:
    shards = {"00001": {"a": torch.ones(1), "c": torch.ones(3)}, "00002": {"b": torch.ones(2)}}
    for number, content in shards.items():
        write(root / "unet" / f"{UNET}-{number}-of-00002.safetensors", save(content))
    weight_map = {key: f"{UNET}-{number}-of-00002.safetensors" for number, content in shards.items() for key in content}
    index = {"metadata": {"total_size": 24}, "weight_map": weight_map}
    write(root / "unet" / f"{UNET}.safetensors.index.json", json.dumps(index).encode())
    return root


def test_a_folder_is_read_with_prefixes(tmp_path: Path):
    with open_checkpoint(diffusers_folder(tmp_path / "my-model")) as checkpoint:
        assert (checkpoint.name, checkpoint.format) == ("my-model", "folder")
        assert {key: info.shape for key, info in checkpoint.infos.items()} == {
            "unet.conv_in.weight": (2,),
            "text_encoder.text_model.x": (3,),
            "text_encoder_2.text_model.x": (4,),
            "vae.decoder.x": (5,),
        }
        assert checkpoint.infos["vae.decoder.x"].dtype == "F32"
        assert checkpoint.metadata == {"format": "pt"}
        assert torch.equal(checkpoint.read("unet.conv_in.weight"), torch.ones(2))
        assert len(checkpoint.files) == 4


def test_a_unet_folder_is_read_without_prefix(tmp_path: Path):
    with open_checkpoint(diffusers_folder(tmp_path / "my-model") / "unet") as checkpoint:
        assert list(checkpoint.infos) == ["conv_in.weight"]
        assert (checkpoint.name, checkpoint.format) == ("my-model", "folder")


def test_shards_are_joined(tmp_path: Path):
    with open_checkpoint(sharded_folder(tmp_path)) as checkpoint:
        assert list(checkpoint.infos) == ["unet.a", "unet.c", "unet.b"]
        assert all(checkpoint.read(f"unet.{key}").numel() == size for key, size in [("a", 1), ("b", 2), ("c", 3)])


def test_a_missing_shard_is_refused(tmp_path: Path):
    missing = sharded_folder(tmp_path) / "unet" / f"{UNET}-00002-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(BadFileError, match="is missing") as error:
        open_checkpoint(tmp_path)
    one_line(error, missing)


def test_a_key_missing_from_its_shard_is_refused(tmp_path: Path):
    shard = sharded_folder(tmp_path) / "unet" / f"{UNET}-00001-of-00002.safetensors"
    write(shard, save({"a": torch.ones(1)}))
    with pytest.raises(BadFileError, match="does not hold 'c'") as error:
        open_checkpoint(tmp_path)
    one_line(error, shard)


def test_shards_without_an_index_are_refused(tmp_path: Path):
    (sharded_folder(tmp_path) / "unet" / f"{UNET}.safetensors.index.json").unlink()
    with pytest.raises(BadFileError, match=r"index\.json is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": [1]}', b'{"weight_map": {"a": 1}}',
     b'{"weight_map": {"a": "../../secret.safetensors"}}', b'{"weight_map": {"a": "/etc/passwd"}}', b"[" * 100_000],
)  # fmt: skip
def test_a_bad_index_is_refused(tmp_path: Path, index: bytes):
    path = sharded_folder(tmp_path) / "unet" / f"{UNET}.safetensors.index.json"
    with pytest.raises(BadFileError) as error:
        open_checkpoint(write(path, index).parent.parent)
    one_line(error, path)


def test_pickles_in_a_folder_are_refused_by_name(tmp_path: Path):
    write(tmp_path / "unet" / f"{UNET}.bin", b"")
    with pytest.raises(BadFileError, match=rf"{UNET}\.bin"):
        open_checkpoint(tmp_path)


def test_a_transformer_in_place_of_a_unet_is_refused(tmp_path: Path):
    write(tmp_path / "transformer" / f"{UNET}.safetensors", VALID)
    write(tmp_path / "vae" / f"{UNET}.safetensors", VALID)
    with pytest.raises(BadFileError, match="transformer/"):
        open_checkpoint(tmp_path)


def test_a_folder_of_other_things_is_refused(tmp_path: Path):
    write(tmp_path / "dreamshaper.safetensors", VALID)
    with pytest.raises(BadFileError, match="holds no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([], (None, ())),
        (["config.json", "model.onnx"], (None, ())),
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], (None, (f"{UNET}.safetensors",))),
        ([f"{UNET}.fp16.safetensors", f"{UNET}.non_ema.safetensors"], (None, (f"{UNET}.fp16.safetensors",))),
        (["model.safetensors", f"{UNET}.safetensors"], (None, (f"{UNET}.safetensors",))),
        (
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json", "model.safetensors"],
            ("model.safetensors.index.json", ("model-1-of-2.safetensors", "model-2-of-2.safetensors")),
        ),
        (["model.safetensors.index.json", "model.safetensors"], (None, ("model.safetensors",))),
        (
            ["model.fp16-1-of-1.safetensors", "model.safetensors.index.fp16.json"],
            ("model.safetensors.index.fp16.json", ("model.fp16-1-of-1.safetensors",)),
        ),
        (
            ["model-1-of-1.fp16.safetensors", "model.fp16.safetensors.index.json"],
            ("model.fp16.safetensors.index.json", ("model-1-of-1.fp16.safetensors",)),
        ),
    ],
)
def test_weights_are_chosen_as_diffusers_does(names: list[str], chosen: Any):
    assert choose_weights(names) == chosen
    assert choose_weights(names[::-1]) == chosen


# pickles


@pytest.mark.skipif(READS_PICKLES, reason="torch 2.6 and newer reads pickles")
def test_old_torch_reads_no_pickles(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    with pytest.raises(UnsafeFileError, match="CVE-2025-32434") as error:
        open_checkpoint(tmp_path / "a.ckpt")
    assert "convert" in one_line(error, tmp_path / "a.ckpt")


@needs_pickles
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".CKPT"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_are_read(tmp_path: Path, suffix: str, is_zip: bool):
    path = tmp_path / f"v1-5{suffix}"
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    written = tensors()
    if not is_zip:
        del written["f8"]  # torch itself cannot read it back
    content = {"epoch": 3, "state_dict": {**written, "parameter": parameter, "step": 7, 5: torch.ones(1)}}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.name, checkpoint.format, checkpoint.metadata) == ("v1-5", "ckpt", {})
        assert checkpoint.infos.keys() == {*written, "parameter"}
        assert all(equal(checkpoint.read(key), tensor) for key, tensor in written.items())
        assert all(checkpoint.raw(key) == tensor_bytes(tensor) for key, tensor in written.items())
        assert not checkpoint.read("parameter").requires_grad
        assert checkpoint.raw("parameter") == tensor_bytes(torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
        assert checkpoint.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@needs_pickles
def test_a_plain_number_as_alpha_is_read(tmp_path: Path):
    """As kohya's scripts take it; other numbers are none of a model."""
    torch.save({"x.lora_up.weight": torch.ones(2), "x.alpha": 2.0, "y.alpha": 4, "z.alpha": True, "step": 7}, tmp_path / "l.pt")
    with open_checkpoint(tmp_path / "l.pt") as checkpoint:
        assert checkpoint.infos.keys() == {"x.lora_up.weight", "x.alpha", "y.alpha"}
        assert (float(checkpoint.read("x.alpha")), float(checkpoint.read("y.alpha"))) == (2.0, 4.0)


def evil_zip(path: Path, folder: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "callback": Runs(folder)}, path)


def evil_old(path: Path, folder: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Runs(folder)}, path, _use_new_zipfile_serialization=False)


def evil_pickle(protocol: int) -> Callable[[Path, Path], None]:
    return lambda path, folder: path.write_bytes(pickle.dumps(Runs(folder), protocol)) and None


@pytest.mark.parametrize("make", [evil_zip, evil_old, *map(evil_pickle, range(5))])
def test_pickles_that_run_code_are_refused(tmp_path: Path, make: Callable[[Path, Path], None]):
    path = tmp_path / "evil.ckpt"
    make(path, tmp_path / "it_ran")
    with pytest.raises(UnsafeFileError) as error:
        open_checkpoint(path)
    one_line(error, path)
    assert not (tmp_path / "it_ran").exists()


def test_the_pickle_of_the_test_would_run_code(tmp_path: Path):
    pickle.loads(pickle.dumps(Runs(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


@needs_pickles
@pytest.mark.parametrize(
    "content", [[1, 2], {"state_dict": {"a": 1}}, {"a": torch.ones(1).to_sparse()}, {"a": torch.ones(1, device="meta")}]
)
def test_pickles_without_plain_tensors_are_refused(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(BadFileError):
        open_checkpoint(tmp_path / "a.ckpt")


@needs_pickles
def test_one_number_spread_over_terabytes_is_refused(tmp_path: Path):
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "a.ckpt")
    with pytest.raises(BadTensorError, match="larger than the data"):
        open_checkpoint(tmp_path / "a.ckpt")


@needs_pickles
@pytest.mark.parametrize("is_zip", [True, False])
def test_truncated_pickles_are_refused(tmp_path: Path, is_zip: bool):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=is_zip)
    data = path.read_bytes()
    for length in [*range(0, len(data) - 1, 37), len(data) - 1]:
        with pytest.raises(DpoError) as error:
            open_checkpoint(write(path, data[:length]))
        one_line(error, path)
        assert is_zip is False or isinstance(error.value, BadFileError)


@needs_pickles
@pytest.mark.parametrize(
    ("data", "message"),
    [(VALID, "a safetensors file"), (b"<html>", "a web page"), (b"hello" * 9, "torch checkpoint"), (b"", "torch checkpoint")],
)
def test_other_things_named_ckpt_are_refused(tmp_path: Path, data: bytes, message: str):
    path = write(tmp_path / "a.ckpt", data)
    with pytest.raises(BadFileError) as error:
        open_checkpoint(path)
    assert message in one_line(error, path)


@needs_pickles
def test_other_archives_named_ckpt_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("holiday.jpg", b"")
    with pytest.raises(BadFileError, match="torch checkpoint"):
        open_checkpoint(tmp_path / "a.ckpt")


# hashes


def old_file(path: Path, data: bytes = VALID) -> Path:
    os.utime(write(path, data), (1_600_000_000, 1_600_000_000))
    return path


def test_hash_of_a_file(tmp_path: Path):
    checkpoint = open_checkpoint(old_file(tmp_path / "a.safetensors"))
    checkpoint.close()
    assert checkpoint.sha256() == hashlib.sha256(VALID).hexdigest()


def test_hash_of_a_folder_is_that_of_names_and_hashes(tmp_path: Path):
    checkpoint = open_checkpoint(sharded_folder(tmp_path))
    lines = b""
    for number in ("00001", "00002"):
        name = f"unet/{UNET}-{number}-of-00002.safetensors"
        lines += f"{name}\0{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}\n".encode()
    assert checkpoint.sha256() == hashlib.sha256(lines).hexdigest()


def test_a_hash_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = old_file(tmp_path / "a.safetensors")
    first = file_sha256(path)
    monkeypatch.setattr(hashes, "_hash", lambda path: pytest.fail("was hashed again"))
    assert file_sha256(path) == first


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_hashed_again(tmp_path: Path, change: str):
    path = old_file(tmp_path / "a.safetensors", b"before")
    file_sha256(path)
    after = b"after!" if change == "time" else b"afterwards"
    path.write_bytes(after)
    if change == "size":
        os.utime(path, (1_600_000_000, 1_600_000_000))
    assert file_sha256(path) == hashlib.sha256(after).hexdigest()


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, own_cache: Path):
    file_sha256(write(tmp_path / "a.safetensors", VALID))
    assert not own_cache.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"%s": 3}', b'{"%s": [1, 2, 3]}', b'{"%s": [1, 2, "x"]}'])
def test_a_bad_cache_does_no_harm(tmp_path: Path, own_cache: Path, content: bytes):
    path = old_file(tmp_path / "a.safetensors")
    write(own_cache, content.replace(b"%s", str(path).encode()))
    assert file_sha256(path) == hashlib.sha256(VALID).hexdigest()
    assert [row[2] for row in json.loads(own_cache.read_text()).values()] == [hashlib.sha256(VALID).hexdigest()]
    assert [file.name for file in own_cache.parent.iterdir()] == ["hashes.json"]


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, own_cache: Path):
    write(own_cache.parent, b"a file where the folder should be")
    assert file_sha256(old_file(tmp_path / "a.safetensors")) == hashlib.sha256(VALID).hexdigest()


def test_hashing_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(BadFileError, match="cannot be read"):
        file_sha256(tmp_path / "none.safetensors")


def test_hashing_runs_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = open_checkpoint(write(tmp_path / "a.safetensors", VALID))
    go_on = threading.Event()

    def slow(path: Path) -> str:
        assert go_on.wait(10)
        assert threading.current_thread().daemon
        return "0" * 64

    monkeypatch.setattr(hashes, "_hash", slow)
    wait = sha256_in_background(checkpoint)
    go_on.set()  # only now, so the call above came back before the hash was there
    assert wait() == wait() == "0" * 64


def test_errors_in_the_background_reach_who_waits(tmp_path: Path):
    checkpoint = open_checkpoint(write(tmp_path / "a.safetensors", VALID))
    checkpoint.path.unlink()
    with pytest.raises(BadFileError, match="cannot be read"):
        sha256_in_background(checkpoint)()
