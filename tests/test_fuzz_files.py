"""Any bytes in the place of a model file: read as the library reads them, or refused. The long form is `make fuzz`."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fuzzing import inputs, tried
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from lib_dpo.families.model import open_model
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.files.header import torch_dtype
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.recipe import is_bake
from lib_dpo.operations.inspect import inspect

READS_PICKLES = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
Entries = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("fuzz")


# ---- headers ----

SIZES = {"F32": 4, "F16": 2, "U8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "BF16": 2, "F64": 8}
names = st.text(max_size=6) | st.sampled_from(
    ["a", "b", "__metadata__", "model.diffusion_model.out.2.bias", "lora_unet_a.alpha"]
)
numbers = (
    st.sampled_from([0, 1, 2, 4, 8, 12, -1, 1 << 31, 1 << 32, 1 << 40, 1 << 63, 1 << 64, 1 << 200, True, False, None, "2", 2.0])
    | st.integers(-2, 40)
    | st.floats()
)
anything = st.recursive(
    numbers | st.sampled_from(["F32", "F4", "F6_E2M3", "C64", "X", "", "é"]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def sound(draw: st.DrawFn) -> Entries:
    """The entries of a valid header."""
    found: Entries = []
    place = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(sorted(SIZES))), draw(st.lists(st.integers(0, 3), max_size=3))
        size = SIZES[dtype]
        for length in shape:
            size *= length
        found.append((name, [("dtype", dtype), ("shape", shape), ("data_offsets", [place, place + size])]))
        place += size
    return [(name, [("format", "pt")]) if name == "__metadata__" else (name, own) for name, own in found]


def spelled(value: Any) -> str:
    """JSON, in which lists of pairs are objects, so that one may hold a name twice."""
    if isinstance(value, list) and value and all(isinstance(each, tuple) for each in value):
        return "{" + ",".join(f"{json.dumps(name)}:{spelled(own)}" for name, own in value) + "}"
    return json.dumps(value, ensure_ascii=False)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file with a header that is valid but for some changes of what it says."""
    entries, change = draw(sound()), st.sampled_from(["none", "field", "field", "lose", "twice", "whole", "more", "offset"])
    size = max((own[2][1][1] for _, own in entries if len(own) == 3), default=0)
    for _ in range(draw(st.integers(0, 2)) if entries else 0):
        place, how = draw(st.integers(0, len(entries) - 1)), draw(change)
        name, own = entries[place]
        own = list(own) if isinstance(own, list) and all(isinstance(each, tuple) for each in own) else []
        spot = draw(st.integers(0, max(len(own) - 1, 0)))
        if how == "field" and own:
            own[spot] = (own[spot][0], draw(anything | st.lists(numbers, max_size=3)))
        elif how == "lose" and own:
            del own[spot]
        elif how == "twice":
            entries.append((name, own))
        elif how == "more":
            own.append((draw(st.text(max_size=4) | st.sampled_from(["dtype", "shape"])), draw(anything)))
        elif how == "offset" and len(own) == 3:
            own[2] = ("data_offsets", [draw(st.integers(0, 30)), draw(st.integers(0, 30))])
        entries[place] = (name, draw(anything) if how == "whole" else own)
    header = (spelled(entries) if entries else "{}").encode("utf-8", "surrogatepass")
    header = draw(st.sampled_from([b"", b"", b"", b" ", b"\n", b"\xef\xbb\xbf"])) + header + b" " * draw(st.integers(0, 8))
    data = bytes(draw(st.sampled_from([size, size, size, size + 1, max(size - 1, 0), 0])))
    length = len(header) + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1, 8, -8, 1 << 40]))
    return max(length, 0).to_bytes(8, "little") + header + data


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Sound bytes, some of them changed, left out, doubled, cut off or exchanged for something that readers trip over."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not found:
            break
        place = draw(st.integers(0, len(found) - 1))
        how = draw(st.sampled_from(["byte", "byte", "bit", "cut", "drop", "again", "put"]))
        if how == "byte":
            found[place] = draw(st.integers(0, 255))
        elif how == "bit":
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del found[place:]
        elif how == "drop":
            del found[place : place + draw(st.integers(1, 9))]
        elif how == "again":
            found[place:place] = found[place : place + draw(st.integers(1, 40))]
        else:
            found[place:place] = draw(
                st.sampled_from([b"\\ud800", b"NaN", b"-", b"1e9", b"[[", b"\0", b"\xff\xfe", b"\x1b", b"9" * 30])
            )
    return bytes(found)


def by_library(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What safetensors itself reads; None where it refuses."""
    try:
        return {name: (own["dtype"], tuple(own["shape"]), bytes(own["data"])) for name, own in deserialize(content)}
    except SafetensorError:
        return None


def by_us(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What we read; None where we refuse it with a sentence."""
    checkpoint, refusal = tried(open_checkpoint, path)
    if checkpoint is None:
        assert str(path) in refusal
        assert len(refusal) < 500 + len(str(path))
        return None
    with checkpoint:
        for key, info in checkpoint.infos.items():
            if torch_dtype(info.dtype):
                assert tuple(checkpoint.read(key).shape) == info.shape
        return {key: (info.dtype, info.shape, bytes(checkpoint.raw(key))) for key, info in checkpoint.infos.items()}


def entered(*fields: str) -> bytes:
    """A file of one float32 with these fields after its own."""
    header = b'{"a":{' + ",".join(['"dtype":"F32"', '"data_offsets":[0,4]', *fields]).encode() + b"}}"
    return len(header).to_bytes(8, "little") + header + bytes(4)


def with_metadata(text: str) -> bytes:
    header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"__metadata__":' + text.encode() + b"}"
    return len(header).to_bytes(8, "little") + header + b"\x01"


VALID = [
    entered('"shape":[1]'),
    len(head := b'{"__metadata__":{"k":"v"},"a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}').to_bytes(8, "little")
    + head + bytes(range(8)),
]  # fmt: skip


@pytest.mark.newest
@inputs(300)
@given(content=headers() | st.sampled_from(VALID).flatmap(damaged))
@example(content=entered('"shape":[1]'))
@example(content=entered('"shape":[1,-0,1]'))
@example(content=entered('"shape":[]', '"more":NaN'))
@example(content=entered('"shape":[]', '"more":' + "[" * 200 + "]" * 200))
@example(content=entered('"shape":[]', '"shape":[1]'))
@example(content=with_metadata("[]"))
@example(content=with_metadata("0"))
@example(content=with_metadata("null"))
def test_headers_are_read_as_the_library_reads_them(folder: Path, content: bytes):
    path = folder / "a.safetensors"
    path.write_bytes(content)
    ours, theirs = by_us(path), by_library(content)
    assert ours is None or ours == theirs
    works_or_is_refused(path)


@pytest.mark.parametrize("more", ["1", '{"x":[1,"s"]}', "[[[]]]", "null"])
def test_other_fields_of_an_entry_are_passed_over(folder: Path, more: str):
    content = entered('"shape":[1]', f'"more":{more}')
    path = folder / "a.safetensors"
    path.write_bytes(content)
    assert by_us(path) == by_library(content) is not None


def works_or_is_refused(path: Path) -> None:
    """Whatever else is asked of a file; what is no DpoError makes the test fail."""
    for way in (open_model, open_offset, inspect, is_bake):
        found, refusal = tried(way, path)
        assert path.name in refusal or not refusal
        if hasattr(found, "close"):
            found.close()


# ---- metadata ----

texts = st.text(max_size=8) | st.sampled_from(
    ["{}", "[]", "null", "1e999", '{"r": 8}', "[" * 2000, '{"type":"dpo-offset"}', "True"]
)
metadata_keys = st.sampled_from(
    [
        "sd_merge_recipe", "sd_merge_models", "lora_adapter_metadata", "dpo.kind", "dpo.energy", "dpo.energies", "dpo.rank",
        "ss_network_args", "ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type", "dpo.form",
        "ss_network_dim", "ss_network_alpha", "dpo.energy_kept", "dpo.strength", "dpo.suggested_strength", "format",
    ]
)  # fmt: skip
recipes = st.fixed_dictionaries(
    {"type": st.just("dpo-offset")},
    optional={
        "multiplier": anything, "offset": anything, "rank": anything, "blocks": anything, "primary_model_hash": anything,
        "offset_kind": anything, "sd_merge_recipe": anything,
    },
).map(json.dumps)  # fmt: skip


@inputs(25)
@given(metadata=st.dictionaries(metadata_keys | st.text(max_size=6), texts | recipes | anything.map(json.dumps), max_size=5))
def test_any_metadata_is_read_or_refused(folder: Path, metadata: dict[str, str]):
    name = "lora_unet_mid_block_resnets_0_conv1.lora_"
    pair = {f"{name}up.weight": torch.ones(4, 2, 1, 1), f"{name}down.weight": torch.ones(2, 4, 3, 3)}
    peft = {"unet.mid_block.resnets.0.conv1.lora_B.weight": torch.ones(4, 2, 1, 1)}
    peft["unet.mid_block.resnets.0.conv1.lora_A.weight"] = torch.ones(2, 4, 3, 3)
    for tensors in (pair, peft):
        works_or_is_refused(tiny.save(folder / "meta.safetensors", tensors, metadata=metadata))


# ---- pickles ----


def _checkpoints() -> list[bytes]:
    """Sound torch checkpoints, zipped and old."""
    found = []
    for is_zip in (True, False):
        stream = io.BytesIO()
        content = {"state_dict": {"a": torch.arange(4.0), "b": torch.nn.Parameter(torch.ones(2, 2).t())}, "epoch": 3}
        torch.save(content, stream, _use_new_zipfile_serialization=is_zip)
        found.append(stream.getvalue())
    return found


SOUND = _checkpoints()


def repacked(content: bytes) -> bytes:
    """A torch archive with this pickle in the place of its own, and a checksum that fits."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SOUND[0])) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, content if member.filename.endswith("data.pkl") else old.read(member))
    return stream.getvalue()


with zipfile.ZipFile(io.BytesIO(SOUND[0])) as _archive:
    INNER = _archive.read(next(name for name in _archive.namelist() if name.endswith("data.pkl")))


@inputs(80)
@given(content=st.sampled_from(SOUND).flatmap(damaged) | damaged(INNER).map(repacked) | st.binary(max_size=40).map(repacked))
@example(content=repacked(pickle.dumps({"a": 1}, protocol=2)))
def test_any_pickle_is_read_or_refused(folder: Path, content: bytes):
    path = folder / "a.ckpt"
    path.write_bytes(content)
    checkpoint, refusal = tried(open_checkpoint, path)
    assert checkpoint or str(path) in refusal
    if checkpoint:
        for key, info in checkpoint.infos.items():
            assert len(checkpoint.raw(key)) == info.nbytes
            assert tuple(checkpoint.read(key).shape) == info.shape
    works_or_is_refused(path)
