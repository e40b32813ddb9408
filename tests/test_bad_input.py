"""Bad files and settings: one line that says what to do, exit code 2, and nothing written, altered or left behind."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lib_dpo.errors import SettingError
from lib_dpo.families.blocks import parse_blocks
from lib_dpo.families.keymap import UNET
from lib_dpo.families.synthetic import offset_tensor
from lib_dpo.files.checkpoint import open_checkpoint

READS_PICKLES = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
QKV = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"  # a canonical key with a LoRA module
CONV = UNET + "middle_block.0.in_layers.2.weight"
ATTENTION_TE = "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight"
MODULE = "lora_unet_mid_block_resnets_0_conv1"
SOME_OF_SDXL = re.compile(r"time_embed|label_emb|input_blocks\.[034]\.|model\.out\.")  # 2,516 keys take their time
BASE, TUNED = (
    {key: tensor for key, tensor in tensors.items() if not key.startswith("first_stage_model.")}
    for tensors in (tiny.base("sd1"), tiny.tuned("sd1"))
)
Files = dict[str, Path]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """Sound files of one pair, which no test may change."""
    folder = tmp_path_factory.mktemp("good")
    sdxl = {key: tensor for key, tensor in tiny.base("sdxl").items() if SOME_OF_SDXL.search(key)}
    sdxl_tuned = {key: tensor for key, tensor in tiny.tuned("sdxl").items() if key in sdxl}
    files = {
        "base": tiny.save(folder / "base.safetensors", BASE, torch.float16),
        "tuned": tiny.save(folder / "tuned.safetensors", tiny.in_diffusers("sd1", TUNED)),
        "whole": tiny.save(folder / "whole.safetensors", TUNED),
        "sdxl": tiny.save(folder / "sdxl.safetensors", sdxl, torch.float16),
        "sdxl_tuned": tiny.save(folder / "sdxl_tuned.safetensors", tiny.in_diffusers("sdxl", sdxl_tuned)),
        "inpainting": tiny.save(
            folder / "inpainting.safetensors", tiny.only_unet(tiny.base("sd1", in_channels=9)), torch.float16
        ),
    }
    for arch, pair in (("", ("base", "tuned")), ("sdxl_", ("sdxl", "sdxl_tuned"))):
        both = ("--base", files[pair[0]], "--tuned", files[pair[1]])
        files[f"{arch}lora"] = folder / f"{arch}lora.safetensors"
        files[f"{arch}offset"] = folder / f"{arch}offset.safetensors"
        assert tiny.run("extract", *both, "-o", files[f"{arch}lora"], "--rank", 4, "--conv-rank", 3) == 0
        assert tiny.run("offset", *both, "-o", files[f"{arch}offset"]) == 0
    before = tiny.snapshot(folder)
    yield files
    assert tiny.snapshot(folder) == before, "an input was altered"


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs a command that must be refused, and returns its one line."""

    def call(*args: object) -> str:
        before = tiny.snapshot(tmp_path)
        capsys.readouterr()
        code = tiny.run(*args)
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1
        assert err.startswith("error: ")
        assert "this should not happen" not in err
        assert tiny.snapshot(tmp_path) == before, "something was written"
        return err.strip()

    return call


def command(name: str, good: Files, tmp_path: Path, **changes: object) -> list[object]:
    """A command on the sound files, some of them exchanged: `base`, `tuned`, `lora`, `offset`, `target` or `file`."""
    files = {"base": good["base"], "tuned": good["tuned"], "lora": good["lora"], "offset": good["offset"]}
    files |= {"target": good["base"], "file": good["base"], "output": tmp_path / "out" / "out.safetensors", **changes}
    pair = ["--base", files["base"], "--tuned", files["tuned"]]
    output = ["-o", files["output"]]
    return {
        "diff": ["diff", *pair],
        "extract": ["extract", *pair, *output, "--rank", 2],
        "offset": ["offset", *pair, *output],
        "verify": ["verify", "--lora", files["lora"], *pair],
        "bake": ["bake", "--target", files["target"], "--offset", files["offset"], *output],
        "resize": ["resize", "--lora", files["lora"], *output, "--rank", 2],
        "inspect": ["inspect", files["file"]],
        "compat": ["compat", "--target", files["target"], *pair],
    }[name]


TWO_FILES = ("diff", "extract", "offset", "verify", "compat")
ROLES = [
    *((name, role) for name in TWO_FILES for role in ("base", "tuned")),
    ("verify", "lora"),
    ("resize", "lora"),
    ("bake", "offset"),
    ("bake", "target"),
    ("compat", "target"),
    ("inspect", "file"),
]
each_role = pytest.mark.parametrize(("name", "role"), ROLES, ids="-".join)


# ---- files that cannot be read ----


def damaged(kind: str, sound: bytes) -> bytes:
    header = int.from_bytes(sound[:8], "little")
    bomb = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}).encode()
    return {
        "empty": b"",
        "eight bytes": sound[:8],
        "truncated in the header": sound[: 8 + header // 2],
        "truncated in the data": sound[:-100],
        "longer than announced": sound + b"\0" * 16,
        "header bomb": (1 << 62).to_bytes(8, "little") + sound[8:200],
        "long header in a short file": (99_000_000).to_bytes(8, "little") + b"{" + b" " * 1000,
        "deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "impossible shape": len(bomb).to_bytes(8, "little") + bomb + bytes(4),
        "text": b"this is no checkpoint\n" * 9,
        "web page": b"<!doctype html><html><body>404</body></html>",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "zip archive": b"PK\x03\x04" + bytes(100),
    }[kind]


KINDS = [
    "empty",
    "eight bytes",
    "truncated in the header",
    "truncated in the data",
    "longer than announced",
    "header bomb",
    "long header in a short file",
    "deep header",
    "impossible shape",
    "text",
    "web page",
    "git-lfs pointer",
    "zip archive",
]


@each_role
def test_a_damaged_file(name: str, role: str, good: Files, tmp_path: Path, refused: Refused):
    sound = good[role if role in good else "base"].read_bytes()
    for kind in KINDS:
        path = tmp_path / f"{kind}.safetensors"
        path.write_bytes(damaged(kind, sound))
        line = refused(*command(name, good, tmp_path, **{role: path}))
        assert path.name in line
        assert re.search("download it|choose another", line), line


@each_role
def test_no_file(name: str, role: str, good: Files, tmp_path: Path, refused: Refused):
    (tmp_path / "folder").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    for path in ("missing.safetensors", "folder", "readme.txt"):
        assert path in refused(*command(name, good, tmp_path, **{role: tmp_path / path}))


class Runs:
    """A pickle of this runs code where it is opened: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@each_role
def test_a_pickle_that_runs_code(name: str, role: str, good: Files, tmp_path: Path, refused: Refused):
    path, trap = tmp_path / "model.ckpt", tmp_path / "it_ran"
    for content in (Runs(trap), {"state_dict": {"a": torch.zeros(2), "b": Runs(trap)}}):
        path.write_bytes(pickle.dumps(content))
        refused(*command(name, good, tmp_path, **{role: path}))
        torch.save(content, path)
        line = refused(*command(name, good, tmp_path, **{role: path}))
        assert "model.ckpt" in line
        assert ("run code" if READS_PICKLES else "torch 2.6") in line
        assert not trap.exists()


@pytest.mark.skipif(READS_PICKLES, reason="newer torch reads plain pickles")
def test_an_old_torch_refuses_even_a_plain_pickle(good: Files, tmp_path: Path, refused: Refused):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": BASE}, path)
    assert "convert the file to .safetensors, or upgrade torch" in refused(*command("extract", good, tmp_path, base=path))


def test_names_from_another_system(good: Files, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]):
    name = os.fsdecode(b"mod\xe8le.safetensors")
    try:
        shutil.copyfile(good["base"], tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert tiny.run(*command("extract", good, tmp_path, base=tmp_path / name)) == 0
    with open_checkpoint(tmp_path / "out" / "out.safetensors") as lora:
        assert lora.metadata["dpo.base"] == "mod?le"
    assert "mod?le.safetensors: has a name" in refused(*command("extract", good, tmp_path, output=tmp_path / "x" / name))
    refused(*command("extract", good, tmp_path, base=tmp_path / "missing" / name))


def test_names_that_would_spoil_a_terminal(good: Files, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]):
    key = f"\x1b[2J\n{'x' * 950}.lokr_w1"
    path = tiny.save(tmp_path / "odd.safetensors", {key: torch.zeros(2)}, metadata={"\x1b[31m": "a\nb\x07"})
    line = refused(*command("bake", good, tmp_path, offset=path))
    assert "\x1b" not in line
    assert len(line) < 3000
    capsys.readouterr()
    assert tiny.run("inspect", path) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a b?" in out


# ---- tensors ----


@pytest.mark.parametrize("name", [*TWO_FILES, "bake"])
def test_a_tensor_of_the_wrong_shape_is_named(name: str, good: Files, tmp_path: Path, refused: Refused):
    tensors = dict(TUNED)
    tensors[CONV] = tensors[CONV][:, :-1]
    path = tiny.save(tmp_path / "odd.safetensors", tensors)
    line = refused(*command(name, good, tmp_path, **{"target" if name == "bake" else "tuned": path}))
    assert CONV in line
    assert "odd.safetensors" in line
    assert "x31x3x3" in line
    assert "x32x3x3" in line


@pytest.mark.parametrize("name", ["bake", "verify"])
@pytest.mark.parametrize("source", ["lora", "offset"])
def test_an_offset_of_the_wrong_shape_is_named(name: str, source: str, good: Files, tmp_path: Path, refused: Refused):
    tensors = load_file(good[source])
    key = f"{MODULE}.lora_down.weight" if source == "lora" else "mid_block.resnets.0.conv1.weight"
    tensors[key] = tensors[key][:, :-1]
    path = tiny.save(tmp_path / "odd.safetensors", tensors, metadata={"dpo.kind": source})
    line = refused(*command(name, good, tmp_path, **{"offset" if name == "bake" else "lora": path}))
    assert CONV in line
    assert "odd" in line


def test_a_wider_model_is_another_model(good: Files, tmp_path: Path, refused: Refused):
    wide = tiny.save(tmp_path / "wide.safetensors", tiny.only_unet(tiny.base("sd1", width=16)), torch.float16)
    for name in (*TWO_FILES, "bake"):
        line = refused(*command(name, good, tmp_path, **{"target" if name == "bake" else "base": wide}))
        assert "wide" in line
    assert "wide" in refused(*command("compat", good, tmp_path, target=wide))


def test_attention_of_te2_in_unequal_parts(good: Files, tmp_path: Path, refused: Refused):
    folder = tiny.save_folder(tmp_path / "folder", "sdxl", tiny.base("sdxl"))
    path = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    key = "text_model.encoder.layers.4.self_attn.k_proj.weight"
    tensors[key] = torch.zeros(16, 17)
    save_file(tensors, path)
    whole = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned("sdxl"))
    for name in ("diff", "extract", "offset"):
        assert key in refused(*command(name, good, tmp_path, base=folder, tuned=whole))


NON_FINITE = [math.nan, -math.inf]


def poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


@pytest.mark.parametrize("value", NON_FINITE)
def test_nan_and_inf_in_a_pair_are_named(value: float, good: Files, tmp_path: Path, refused: Refused):
    for role, key in (("base", QKV), ("tuned", CONV), ("base", UNET + "out.0.bias")):
        tensors = BASE if role == "base" else TUNED
        stored = {**tensors, key: poisoned(tensors[key], value)}
        path = tiny.save(tmp_path / f"bad_{role}.safetensors", stored)
        for name in TWO_FILES:
            line = refused(*command(name, good, tmp_path, **{role: path}))
            assert path.name in line
            assert key in line
            assert "NaN or Inf" in line


def test_nan_in_a_diffusers_file_is_named_as_it_is_there(good: Files, tmp_path: Path, refused: Refused):
    tensors = load_file(good["tuned"])
    key = "down_blocks.0.attentions.0.proj_in.weight"
    tensors[key] = poisoned(tensors[key], math.nan)
    path = tiny.save(tmp_path / "bad.safetensors", tensors)
    for name in TWO_FILES:
        assert f" {key} " in refused(*command(name, good, tmp_path, tuned=path))


def test_nan_in_a_text_encoder_is_named(good: Files, tmp_path: Path, refused: Refused):
    tensors = {**TUNED, ATTENTION_TE: poisoned(BASE[ATTENTION_TE], math.nan)}
    path = tiny.save(tmp_path / "bad.safetensors", tensors)
    for name in ("diff", "extract", "offset", "verify"):
        line = refused(*command(name, good, tmp_path, tuned=path))
        assert ATTENTION_TE in line
        assert path.name in line


@pytest.mark.parametrize("value", NON_FINITE)
def test_nan_and_inf_in_a_target_are_named(value: float, good: Files, tmp_path: Path, refused: Refused):
    path = tiny.save(tmp_path / "bad.safetensors", {**BASE, CONV: poisoned(BASE[CONV], value)})
    for name in ("bake", "compat"):
        line = refused(*command(name, good, tmp_path, target=path))
        assert path.name in line
        assert CONV in line
        assert "NaN or Inf" in line
        assert "strength" not in line


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha"])
def test_nan_and_inf_in_a_lora_are_named(value: float, part: str, good: Files, tmp_path: Path, refused: Refused):
    tensors = load_file(good["lora"])
    tensors[f"{MODULE}.{part}"] = poisoned(tensors[f"{MODULE}.{part}"], value)
    path = tiny.save(tmp_path / "bad.safetensors", tensors)
    for name, role in (("verify", "lora"), ("bake", "offset"), ("resize", "lora")):
        line = refused(*command(name, good, tmp_path, **{role: path}))
        assert "bad" in line
        assert MODULE in line or CONV in line
        assert "NaN or Inf" in line


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("metadata", [{"dpo.kind": "offset"}, {"format": "pt"}], ids=["marked", "unmarked"])
def test_nan_and_inf_in_an_offset_file_are_named(
    value: float, metadata: dict[str, str], good: Files, tmp_path: Path, refused: Refused
):
    tensors = load_file(good["offset"])
    for key, own in (
        ("mid_block.resnets.0.conv1.weight", CONV),
        ("mid_block.resnets.0.norm1.weight", "middle_block.0.in_layers.0"),
    ):
        path = tiny.save(tmp_path / "bad.safetensors", {**tensors, key: poisoned(tensors[key], value)}, metadata=metadata)
        for name, role in (("verify", "lora"), ("bake", "offset")):
            line = refused(*command(name, good, tmp_path, **{role: path}))
            assert "bad" in line
            assert own in line or key in line
            assert "NaN or Inf" in line
        assert tiny.run("inspect", path) == 0


@pytest.mark.parametrize("role", ["base", "tuned", "target"])
def test_missing_unet_tensors(role: str, good: Files, tmp_path: Path, refused: Refused):
    missing = {QKV, UNET + "out.2.bias"}
    tensors = {key: tensor for key, tensor in TUNED.items() if key not in missing}
    path = tiny.save(tmp_path / "part.safetensors", tensors)
    for name in ("bake", "compat") if role == "target" else TWO_FILES:
        line = refused(*command(name, good, tmp_path, **{role: path}))
        assert "part.safetensors" in line
        assert any(key in line for key in missing)


def test_tensors_that_are_no_numbers(good: Files, tmp_path: Path, refused: Refused):
    for dtype in (torch.bool, torch.int8, torch.complex64):
        if dtype is torch.complex64 and not READS_PICKLES:
            continue  # safetensors 0.4.2 writes none
        tensors = {**BASE, QKV: torch.zeros(8, 8, dtype=dtype)}
        path = tiny.save(tmp_path / "odd.safetensors", tensors)
        for name in (*TWO_FILES, "bake"):
            assert QKV in refused(*command(name, good, tmp_path, **{"target" if name == "bake" else "base": path}))


# ---- files that do not belong together ----


@pytest.mark.parametrize("name", TWO_FILES)
def test_mismatched_architectures(name: str, good: Files, tmp_path: Path, refused: Refused):
    for changes in ({"base": good["sdxl"]}, {"tuned": good["sdxl_tuned"]}):
        line = refused(*command(name, good, tmp_path, **changes))
        assert "SD 1.x" in line
        assert "SDXL" in line


def test_mismatched_offsets_and_targets(good: Files, tmp_path: Path, refused: Refused):
    for source in ("lora", "offset"):
        lines = [
            refused(*command("bake", good, tmp_path, offset=good[f"sdxl_{source}"])),
            refused(*command("verify", good, tmp_path, lora=good[f"sdxl_{source}"])),
            refused(*command("bake", good, tmp_path, offset=good[source], target=good["sdxl"])),
        ]
        lines.append(refused(*command("compat", good, tmp_path, target=good["sdxl"])))
        assert all("SD 1.x" in line and "SDXL" in line for line in lines)


@pytest.mark.parametrize("arch", ["sd2", "sdxl-refiner"])
def test_all_supported_architectures_are_told_apart(arch: str, good: Files, tmp_path: Path, refused: Refused):
    path = tiny.save(tmp_path / "other.safetensors", tiny.only_unet(tiny.base(arch)), torch.float16)
    for name, role in (("extract", "base"), ("diff", "tuned"), ("bake", "target"), ("compat", "target")):
        assert "other.safetensors is SD" in refused(*command(name, good, tmp_path, **{role: path})).replace("but ", "")


@pytest.mark.parametrize("name", TWO_FILES)
def test_an_inpainting_model_and_a_plain_one(name: str, good: Files, tmp_path: Path, refused: Refused):
    for changes in ({"base": good["inpainting"]}, {"tuned": good["inpainting"]}):
        line = refused(*command(name, good, tmp_path, **changes))
        assert "inpainting" in line
        assert "9 input channels" in line
        assert "4 input channels" in line


@pytest.mark.parametrize("name", TWO_FILES)
def test_base_equals_tuned(name: str, good: Files, tmp_path: Path, refused: Refused):
    copy, link = tmp_path / "copy.safetensors", tmp_path / "link.safetensors"
    shutil.copyfile(good["base"], copy)
    link.symlink_to(good["base"])
    unet = tiny.save(tmp_path / "unet.safetensors", tiny.in_diffusers("sd1", BASE))
    folder = tiny.save_folder(tmp_path / "folder", "sd1", tiny.base("sd1"), shards=2)
    for tuned in (good["base"], link, copy, unet, folder):
        line = refused(*command(name, good, tmp_path, tuned=tuned))
        assert "the same" in line
        assert "base.safetensors" in line


def test_a_file_of_the_wrong_kind(good: Files, tmp_path: Path, refused: Refused):
    for name in TWO_FILES:
        assert "lora.safetensors" in refused(*command(name, good, tmp_path, base=good["lora"]))
    for name, role in (("bake", "offset"), ("verify", "lora")):
        assert "holds the weights of a model" in refused(*command(name, good, tmp_path, **{role: good["whole"]}))
    assert "no LoRA pairs" in refused(*command("resize", good, tmp_path, lora=good["offset"]))
    for name, role in (("bake", "target"), ("compat", "target"), ("extract", "base"), ("extract", "tuned")):
        assert "offset" in refused(*command(name, good, tmp_path, **{role: good["offset"]}))


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
    ],
)
def test_families_that_are_not_supported_are_named(key: str, family: str, good: Files, tmp_path: Path, refused: Refused):
    path = tiny.save(tmp_path / "other.safetensors", {key: torch.zeros(4, 4), "a.bias": torch.zeros(4)})
    for name, role in ROLES:
        if name in ("inspect", "resize"):
            continue
        line = refused(*command(name, good, tmp_path, **{role: path}))
        assert f"other.safetensors: this is {family}" in line
    assert "no LoRA pairs" in refused(*command("resize", good, tmp_path, lora=path))
    known = "controlnet" if "ControlNet" in family else "unknown"
    assert tiny.figures(tmp_path / "r.json", "inspect", path)["kind"] == known


@pytest.mark.parametrize("end", ["scale", "weight.scale", "scale_inv", "weight_scalar", "input_scale", "weight.absmax"])
def test_a_weight_that_others_multiply_is_not_taken_as_it_is(end: str, good: Files, tmp_path: Path, refused: Refused):
    """As quantisers write them: the stored number, of fp8 say, means something with its scale alone."""
    layer = tiny.UNET + "middle_block.1.proj_in"
    tensors = tiny.base()
    tensors[f"{layer}.{end}"] = torch.tensor(1e-4)
    path = tiny.save(tmp_path / "scaled.safetensors", tensors)
    for name, role in (("bake", "target"), ("compat", "target"), ("extract", "base"), ("diff", "tuned")):
        line = refused(*command(name, good, tmp_path, **{role: path}))
        assert f"whose numbers are multiplied by others such as {layer}.{end}" in line


@pytest.mark.parametrize(
    "suffixes", [("oft_blocks",), ("ia3_l", "on_input"), ("vera_lambda_b", "vera_lambda_d"), ("hada_w3",), ("lokr_t1",)]
)
def test_other_decompositions_are_named(suffixes: tuple[str, ...], good: Files, tmp_path: Path, refused: Refused):
    own = {f"{MODULE}.{suffix}": torch.zeros(4, 4) for suffix in suffixes}
    path = tiny.save(tmp_path / "other.safetensors", {**own, f"{MODULE}.alpha": torch.tensor(4.0)})
    mixed = tiny.save(tmp_path / "mixed.safetensors", {**load_file(good["lora"]), **own})
    for file in (path, mixed):
        for name, role in (("verify", "lora"), ("bake", "offset"), ("resize", "lora")):
            line = refused(*command(name, good, tmp_path, **{role: file}))
            assert file.name in line
            assert suffixes[0] in line
            assert "belongs to" in line
        assert tiny.run("inspect", file) == 0


def test_half_a_lora(good: Files, tmp_path: Path, refused: Refused):
    tensors = load_file(good["lora"])
    del tensors[f"{MODULE}.lora_up.weight"]
    path = tiny.save(tmp_path / "half.safetensors", tensors)
    for name, role in (("verify", "lora"), ("bake", "offset"), ("resize", "lora")):
        line = refused(*command(name, good, tmp_path, **{role: path}))
        assert "half.safetensors" in line
        assert MODULE in line


# ---- settings ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "rank 0 .* at least 1"),
        (["--rank", "-3"], "rank -3 .* at least 1"),
        (["--rank", "33"], "rank 33 .* at most 32"),
        (["--rank", str(10**30)], "at most 32"),
        (["--rank", "2.5"], "--rank.*not a whole number"),
        (["--rank", "nan"], "--rank.*not a whole number"),
        (["--conv-rank", "0", "--rank", "2"], "conv_rank 0 .* at least 1"),
        (["--conv-rank", "-1", "--rank", "2"], "conv_rank -1 .* at least 1"),
        (["--conv-rank", "33", "--rank", "2"], "conv_rank 33 .* at most 32"),
        (["--energy", "0"], "energy 0 .*more than 0"),
        (["--energy", "-0.1"], "energy -0.1 .* at least 0"),
        (["--energy", "1.01"], "energy 1.01 .* at most 1"),
        (["--energy", "nan"], "energy nan"),
        (["--energy", "inf"], "energy inf"),
        (["--size-mb", "0"], "size 0 MB .* at least"),
        (["--size-mb", "-5"], "size_mb -5.0 .* at least"),
        (["--size-mb", "nan"], "size_mb nan"),
        (["--size-mb", "inf"], "size_mb inf"),
        (["--size-mb", "1e305"], "size_mb 1e.305 .* at most"),
        (["--size-mb", "0.001"], "size 0.001 MB .* at least"),
        (["--rank", "4", "--energy", "0.5"], "rank and energy exclude"),
        (["--energy", "0.5", "--size-mb", "4"], "energy and size_mb exclude"),
        (["--energy", "0.5", "--conv-rank", "4"], "conv_rank goes with rank only"),
        (["--seed", "-1"], "seed -1 .* at least 0"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--device", "cuda:99"], "device 'cuda:99' is not on this machine"),
        (["--device", ""], "device ''"),
        (["--device", "meta"], "device 'meta'"),
        (["--method", "guess"], "--method"),
        (["--profile", "tiny"], "--profile"),
        (["--precision", "fp4"], "--precision"),
        (["--form", "exact", "--rank", "8"], "leave out rank"),
        (["--wrong"], "--wrong"),
    ],
    ids=" ".join,
)
def test_settings_of_extract(arguments: list[str], words: str, good: Files, tmp_path: Path, refused: Refused):
    arguments = arguments if {"--rank", "--energy", "--size-mb"} & set(arguments) else ["--rank", "2", *arguments]
    line = refused(*command("extract", good, tmp_path)[:-2], *arguments)
    assert re.search(words, line), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_on_a_machine_without_it(good: Files, tmp_path: Path, refused: Refused):
    for name in ("extract", "diff"):
        assert "device 'cuda' is not on this machine" in refused(*command(name, good, tmp_path), "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "rank 0 .* at least 1"),
        (["--rank", "5"], "rank 5 is above the LoRA's own 4"),
        (["--rank", "2", "--conv-rank", "4"], "conv_rank 4 .* own 3"),
        (["--energy", "1.5"], "energy 1.5 .* at most 1"),
        (["--size-mb", "0"], "size 0 MB"),
        (["--size-mb", "0.001"], "size 0.001 MB"),
        ([], "--rank, --energy or --size-mb"),
        (["--conv-rank", "2"], "--rank, --energy or --size-mb"),
    ],
    ids=" ".join,
)
def test_settings_of_resize(arguments: list[str], words: str, good: Files, tmp_path: Path, refused: Refused):
    assert re.search(words, refused(*command("resize", good, tmp_path)[:-2], *arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strength", "nan"], "strength nan"),
        (["--strength", "inf"], "strength inf"),
        (["--strength", "-inf"], "strength"),
        (["--strength", "much"], "--strength"),
        (["--blocks", "IN=0.5,NOSE=1"], "'NOSE=1'"),
        (["--blocks", "IN00"], "'IN00'"),
        (["--blocks", "IN00=nan"], "'IN00=nan'"),
        (["--blocks", "IN00=1e999"], "'IN00=1e999'"),
        (["--blocks", "IN00=0.5.5"], "'IN00=0.5.5'"),
        (["--blocks", "IN00=1,IN12=0"], "IN12"),
        (["--blocks", "TE2=0"], "TE2"),
        (["--precision", "int8"], "--precision"),
    ],
    ids=" ".join,
)
def test_settings_of_bake(arguments: list[str], words: str, good: Files, tmp_path: Path, refused: Refused):
    arguments = [f"{arguments[0]}={arguments[1]}"]
    assert words in refused(*command("bake", good, tmp_path), *arguments)


def test_a_strength_that_no_half_precision_number_holds(good: Files, tmp_path: Path, refused: Refused):
    line = refused(*command("bake", good, tmp_path), "--strength", "1e12")
    assert "strength 1e+12 is too large; expected -10 to 10" in line


# ---- outputs ----

WRITERS = ("extract", "offset", "bake", "resize")


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_cannot_be_written(name: str, good: Files, tmp_path: Path, refused: Refused):
    file, folder = tmp_path / "file", tmp_path / "folder.safetensors"
    file.write_text("not a folder")
    folder.mkdir()
    assert "is a folder" in refused(*command(name, good, tmp_path, output=folder))
    below = file / "out.safetensors"
    assert str(below) in refused(*command(name, good, tmp_path, output=below))
    assert "out.bin" in refused(*command(name, good, tmp_path, output=tmp_path / "out.bin"))
    assert ".safetensors" in refused(*command(name, good, tmp_path, output=tmp_path / "out"))
    refused(*command(name, good, tmp_path, output=tmp_path / ("x" * 300 + ".safetensors")))


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_may_not_be_written_to(
    name: str, good: Files, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    closed = tmp_path / "closed"
    closed.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *args, **kw: Path(path) != closed and access(path, *args, **kw))
    line = refused(*command(name, good, tmp_path, output=closed / "out.safetensors"))
    assert str(closed) in line


@pytest.mark.parametrize("name", WRITERS)
def test_no_space(name: str, good: Files, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    line = refused(*command(name, good, tmp_path))
    assert re.search(r"out\.safetensors: needs [\d.]+ MB, 0\.0 MB are free; free some space", line)


@pytest.mark.parametrize("name", WRITERS)
def test_an_existing_output_is_kept(name: str, good: Files, tmp_path: Path, refused: Refused):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"mine")
    line = refused(*command(name, good, tmp_path, output=path))
    assert "mine.safetensors" in line
    assert "--overwrite" in line
    assert path.read_bytes() == b"mine"
    assert tiny.run(*command(name, good, tmp_path, output=path), "--overwrite") == 0
    with open_checkpoint(path) as written:
        assert len(written.infos) > 100


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_that_is_an_input(name: str, good: Files, tmp_path: Path, refused: Refused):
    inputs = {"extract": ["base", "tuned"], "offset": ["base", "tuned"], "bake": ["target", "offset"], "resize": ["lora"]}
    for role in inputs[name]:
        path, link = tmp_path / f"{role}.safetensors", tmp_path / f"link_{role}.safetensors"
        shutil.copyfile(good["base" if role == "target" else role], path)
        link.symlink_to(path)
        for output in (path, link):
            line = refused(*command(name, good, tmp_path, **{role: path, "output": output}), "--overwrite")
            assert "is one of the inputs" in line
            assert output.name in line


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_report_that_cannot_be_written(option: str, good: Files, tmp_path: Path, refused: Refused):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.png").mkdir()
    shutil.copyfile(good["base"], tmp_path / "base.safetensors")
    arguments = command("diff", good, tmp_path, base=tmp_path / "base.safetensors")
    for place in ("file/report", "folder.png", "base.safetensors", "other.ckpt"):
        assert place in refused(*arguments, option, tmp_path / place)
    if option == "--json":
        for name in WRITERS:
            assert "report" in refused(*command(name, good, tmp_path), option, tmp_path / "file" / "report.json")


# ---- anything ----

FEW = {
    key: tensor
    for key, tensor in BASE.items()
    if re.search(r"time_embed|input_blocks\.[01]\.|model\.out\.[02]|text_model\.encoder\.layers\.0\.", key)
    and not re.search(r"output|\.bias|norm", key)
}
SMALL = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn, torch.int8, torch.bool]
VALUES = [0.0, 1.0, 1e-30, 6e4, 3e38, math.nan, math.inf]


class Few:
    """Made by `few`; no dataclass, since hypothesis would print all numbers."""

    def __init__(self, folder: Path, lora: tiny.Tensors, unet: tiny.Tensors) -> None:
        self.folder, self.lora, self.unet = folder, lora, unet


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Few:
    """A model with a few layers, and the contents of its LoRA and of a UNet-only file."""
    folder = tmp_path_factory.mktemp("few")
    tuned = {key: tensor + offset_tensor(key, tensor.shape, rms=1e-3) for key, tensor in FEW.items()}
    base = tiny.save(folder / "base.safetensors", FEW)
    both = ("--base", base, "--tuned", tiny.save(folder / "tuned.safetensors", tuned))
    for name, more in (("lora", ("--rank", 2)), ("offset", ())):
        kind = "extract" if name == "lora" else "offset"
        assert tiny.run(kind, *both, "-o", folder / f"{name}.safetensors", *more) == 0
    return Few(folder, load_file(folder / "lora.safetensors"), tiny.in_diffusers("sd1", tuned))


Edit = tuple[str, int, int, str]
ACTIONS = ["lose", "rename", "name anew", "swap", "retype", "retype", "reshape", "fill", "fill"]
EDITS = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, 99), st.integers(0, 99), st.text(min_size=1, max_size=30)),
    min_size=1,
    max_size=3,
)


def edited(tensors: tiny.Tensors, edits: list[Edit]) -> tiny.Tensors:
    """The same tensors with some of them lost, renamed, retyped, reshaped or filled with something else."""
    found = dict(tensors)
    for action, where, which, text in edits:
        key = sorted(found)[where % len(found)]
        tensor, head = found.pop(key), key.rpartition(".")[0]
        names = [f"{head}{end}" for end in (".diff", ".diff_b", ".alpha", ".bias", ".lora_mid.weight", ".weight.weight")]
        names += [key.replace("up", "down"), key.replace("_q", "_k"), "unet." + key]
        numel = tensor.numel()
        shapes = [(*tensor.shape, 1), tensor.shape[::-1], (1, *tensor.shape), (numel,), (), (0,), (2, 0), (3, 2, 1, 1, 1)]
        if action == "rename":
            found[names[which % len(names)]] = tensor
        elif action == "name anew" and text != "__metadata__":
            found[text] = tensor
        elif action == "swap" and found:
            other = sorted(found)[which % len(found)]
            found[key], found[other] = found[other], tensor
        elif action == "retype":
            found[key] = tensor.to(DTYPES[which % len(DTYPES)])
        elif action == "reshape":
            found[key] = torch.ones(shapes[which % len(shapes)]).to(tensor.dtype)
        elif action == "fill":
            found[key] = torch.full(tensor.shape, VALUES[which % len(VALUES)]).to(tensor.dtype)
        found = found or {"a": tensor}
    return found


def works_or_is_refused(folder: Path, *args: object) -> None:
    """What is neither makes the test fail with its own exception."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    report = folder / "report.json"
    code = tiny.run_openly(*args, "--json", report)
    assert code in (0, 2)
    if code == 0:
        tiny.read_json(report)
    else:
        assert tiny.snapshot(folder) == {}


@SMALL
@given(edits=EDITS)
def test_any_lora_works_or_is_refused(few: Few, edits: list[Edit]):
    folder = few.folder
    path, out = folder / "any.safetensors", folder / "out"
    tiny.save(path, edited(few.lora, edits))
    both = ("--base", folder / "base.safetensors", "--tuned", folder / "tuned.safetensors")
    works_or_is_refused(out, "inspect", path)
    works_or_is_refused(out, "verify", "--lora", path, *both)
    works_or_is_refused(out, "bake", "--target", both[1], "--offset", path, "-o", out / "o.safetensors")
    for policy in (("--rank", 1), ("--energy", 0.5), ("--size-mb", 0.05)):
        works_or_is_refused(out, "resize", "--lora", path, "-o", out / "o.safetensors", *policy)


@SMALL
@given(edits=EDITS, whole=st.booleans())
def test_any_unet_works_or_is_refused(few: Few, edits: list[Edit], *, whole: bool):
    folder = few.folder
    path, dense, out = folder / "any.safetensors", folder / "any_offset.safetensors", folder / "out"
    tensors = edited(FEW if whole else few.unet, edits)
    tiny.save(path, tensors)
    tiny.save(dense, tensors, metadata={"dpo.kind": "offset"})
    base = folder / "base.safetensors"
    pair = ("--base", base, "--tuned", path)
    works_or_is_refused(out, "inspect", path)
    works_or_is_refused(out, "diff", *pair)
    works_or_is_refused(out, "extract", *pair, "-o", out / "o.safetensors", "--rank", 1)
    works_or_is_refused(out, "extract", *pair, "-o", out / "o.safetensors", "--energy", 0.5, "--profile", "full")
    works_or_is_refused(out, "offset", *pair, "-o", out / "o.safetensors")
    works_or_is_refused(out, "verify", "--lora", folder / "lora.safetensors", *pair)
    works_or_is_refused(out, "bake", "--target", path, "--offset", folder / "offset.safetensors", "-o", out / "o.safetensors")
    works_or_is_refused(out, "bake", "--target", base, "--offset", dense, "-o", out / "o.safetensors", "--precision", "bf16")
    works_or_is_refused(out, "compat", "--target", path, "--base", base, "--tuned", folder / "tuned.safetensors")


NAMES = st.sampled_from(["IN00", "IN", "OUT11", "MID", "TE1", "ALL", "IN99", "BASE", "in00", ""])
NUMBERS = st.one_of(st.floats().map(repr), st.integers().map(str), st.sampled_from(["1e999", "٣", "1_0", "+.5", "."]))


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.tuples(NAMES, NUMBERS).map("=".join)).map(",".join)))
def test_any_block_weights_are_read_or_refused(text: str):
    try:
        blocks = parse_blocks(text)
    except SettingError:
        return
    assert all(math.isfinite(weight) for _, weight in blocks.weights)
    assert dict(parse_blocks(str(blocks)).weights) == pytest.approx(dict(blocks.weights), rel=1e-5)


def test_files_of_one_name_are_told_apart(good: Files, tmp_path: Path, refused: Refused):
    one, other = tmp_path / "one" / "model.safetensors", tmp_path / "other" / "model.safetensors"

    def refusal(tuned: Path) -> str:
        for source, place in ((good["base"], one), (tuned, other)):
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(source.read_bytes())
        return refused("offset", "--base", one, "--tuned", other, "-o", tmp_path / "o.safetensors")

    one_name, other_name = (str(path.relative_to(tmp_path)) for path in (one, other))
    wrong = refusal(good["sdxl"])
    assert f"{one_name} is SD 1.x but {other_name} is SDXL" in wrong
    assert f"{one_name} and {other_name} hold the same UNet" in refusal(good["base"])
    assert f"{other_name} takes 9 input channels" in refusal(good["inpainting"])
    lacking = dict(TUNED)
    del lacking[UNET + "out.2.bias"]
    assert f"error: {other_name} lacks 1 of" in refusal(tiny.save(tmp_path / "lacking.safetensors", lacking))
    broken = {**TUNED, UNET + "out.2.bias": torch.full_like(TUNED[UNET + "out.2.bias"], float("nan"))}
    assert f"error: {other_name}: tensor" in refusal(tiny.save(tmp_path / "broken.safetensors", broken))
    assert f"error: {other_name} is an offset file" in refusal(good["offset"])
