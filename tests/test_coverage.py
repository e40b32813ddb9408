"""Every key of every file is in the figures or named as left out."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_dpo.errors import MismatchError
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import Model
from lib_dpo.families.shapes import unet_name_pairs
from lib_dpo.files.checkpoint import Checkpoint
from lib_dpo.files.header import TensorInfo
from lib_dpo.offsets.coverage import contents, left_out, left_out_of_unets
from lib_dpo.offsets.offset import Pair, open_pair

KEYS = Path(__file__).parent / "keys"
WHOLE = {"sd15_ldm": "sd15_unet_diffusers", "sdxl_sgm": "sdxl_unet_diffusers"}
GUIDANCE = "time_embedding.cond_proj.weight"
TWO_FILES = ("diff", "extract", "offset", "verify", "compat")
ODD = [
    "model_ema.diffusion_modelinput_blocks00weight",
    "model_ema.num_updates",
    "model.diffusion_model.time_embed.cond_proj.weight",
    "model.diffusion_model.input_blocks.3.0.in_layers.0.weight",
    "model.diffusion_model.brand_new.weight",
    "time_embedding.cond_proj.weight",
    "mid_block.attentions.7.weight",
    "cond_stage_model.transformer.text_projection.weight",
    "cond_stage_model.transformer.embeddings.position_embedding.weight",
    "cond_stage_model.logit_scale",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "conditioner.embedders.1.model.token_embedding.weight",
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.weight",
    "text_encoder_2.text_model.embeddings.token_embedding.weight",
    "first_stage_model.loss.logvar",
    "vae.decoder.conv_in.weight",
    "safety_checker.special_care_embeds",
    "v_pred",
    "ztsnr",
    "betas",
    "lora_unet_out_0.lora_up.weight",
    "control.weight",
    "",
    ".",
]
NAMES = st.sampled_from(ODD) | st.text("ab_.\n\u2603", max_size=12)
DTYPES = st.sampled_from(["F16", "F32", "BF16", "F64", "F8_E4M3", "I64", "U8", "BOOL", "C64"])


class Listed(Checkpoint):
    """A checkpoint that has names, dtypes and shapes; all its numbers are 1."""

    def __init__(self, name: str, infos: dict[str, TensorInfo]) -> None:
        self.path, self.name, self.infos, self.metadata, self.files = Path(name), name, infos, {}, ()
        self.format = "safetensors"

    def read(self, key: str) -> torch.Tensor:
        return torch.ones(1)

    def raw(self, key: str) -> memoryview:
        return memoryview(b"1")


def listed(name: str, infos: dict[str, TensorInfo]) -> Model:
    return Model(Listed(name, infos))


@cache
def published(name: str) -> dict[str, TensorInfo]:
    rows = (line.split("\t") for line in (KEYS / f"{name}.tsv").read_text(encoding="utf-8").splitlines())
    return {
        key: TensorInfo(dtype, tuple(map(int, shape.strip("-").split("x") if shape != "-" else ())), 0)
        for key, dtype, shape in rows
    }


FEW = re.compile(r"time_embed|label_emb|input_blocks\.[01]\.|layers\.0\.|\.embeddings\.|betas")


@cache
def few(name: str) -> dict[str, TensorInfo]:
    """Some of a published file's tensors, of a UNet those that the whole file has here too: all of them take their time."""
    if name in WHOLE:
        return {key: info for key, info in published(name).items() if FEW.search(key)}
    whole = next(whole for whole, unet in WHOLE.items() if unet == name)
    names = unet_name_pairs({"sd15_ldm": "sd1", "sdxl_sgm": "sdxl"}[whole])
    return {names[key]: published(name)[names[key]] for key in few(whole) if key in names}


def with_odd(name: str, odd: dict[str, str]) -> dict[str, TensorInfo]:
    known = published("sdxl_sgm")
    return {key: TensorInfo(dtype, known[key].shape if key in known else (1, 1), 0) for key, dtype in odd.items()} | few(name)


def check_partition(model: Model) -> None:
    found = contents(model)
    parts = [*found.components.values(), *(row.keys for row in found.beside)]
    keys = [key for part in parts for key in part]
    assert sorted(keys) == sorted(model.checkpoint.infos)


def check_pair(pair: Pair) -> None:
    for holder, model in (("base", pair.base), ("tuned", pair.tuned)):
        compared = [name for key in pair.keys for name in model.sources[key].keys]
        rest = [key for row in left_out(pair) if row.holder in (holder, "both") for key in row.keys]
        assert sorted([*compared, *rest]) == sorted(model.checkpoint.infos)


@pytest.mark.parametrize("name", [*WHOLE, *WHOLE.values()])
def test_published_files_hold_nothing_that_is_unknown(name: str):
    model = listed(name, published(name))
    check_partition(model)
    assert [row.kind.name for row in contents(model).beside if row.kind.weights] == []


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=25)
@given(
    ours=st.dictionaries(NAMES, DTYPES, max_size=8),
    theirs=st.dictionaries(NAMES, DTYPES, max_size=8),
    whole=st.booleans(),
)
def test_the_parts_of_any_file_are_all_of_its_keys(name: str, ours: dict[str, str], theirs: dict[str, str], *, whole: bool):
    base, tuned = listed("base", with_odd(name, ours)), listed("tuned", with_odd(name if whole else WHOLE[name], theirs))
    for model in (base, tuned):
        check_partition(model)
    try:
        pair = open_pair(base, tuned)
    except MismatchError as error:  # an odd name that is read as a known tensor, of another shape in the other file
        if "base and tuned must have the same shapes" not in str(error):
            raise
        return
    check_pair(pair)
    unets = [key for key in pair.keys if key.startswith(UNET)]
    rows = left_out_of_unets(pair, base, unets)
    for holder, model in (("base", base), ("tuned", tuned), ("target", base)):
        compared = [name for key in unets for name in model.sources[key].keys]
        rest = [key for row in rows if row.holder == holder for key in row.keys]
        assert sorted([*compared, *rest]) == sorted(model.checkpoint.infos)


# ---- what the commands say ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, its tuned UNet, and the same as an LCM: with a guidance embedding."""
    folder = tmp_path_factory.mktemp("files")
    base, tuned = tiny.base(), tiny.in_diffusers("sd1", tiny.only_unet(tiny.tuned()))
    both = {"base": tiny.save(folder / "base.safetensors", base, torch.float16)}
    both["tuned"] = tiny.save(folder / "tuned.safetensors", tuned)
    both["lcm"] = tiny.save(folder / "lcm.safetensors", {**tuned, GUIDANCE: torch.ones(8, 4)})
    both["lcm_base"] = tiny.save(
        folder / "lcm_base.safetensors", {**base, f"{UNET}time_embed.cond_proj.weight": torch.ones(8, 4)}
    )
    both["lora"] = folder / "lora.safetensors"
    assert tiny.run("extract", "--base", both["base"], "--tuned", both["tuned"], "-o", both["lora"], "--rank", 2) == 0
    return both


def answers(
    name: str, files: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str], **given: Path
) -> tuple[str, dict[str, Any]]:
    """What a command prints, and its figures."""
    chosen = {"base": files["base"], "tuned": files["tuned"], "target": files["base"], **given}
    args: list[object] = [name, "--base", chosen["base"], "--tuned", chosen["tuned"]]
    args += {"verify": ["--lora", files["lora"]], "compat": ["--target", chosen["target"]]}.get(name, [])
    args += ["-o", folder / "out.safetensors", "--overwrite"] if name in ("extract", "offset") else []
    args += ["--rank", 2] if name == "extract" else []
    capsys.readouterr()
    figures = tiny.figures(folder / "report.json", *args)
    return capsys.readouterr().out, figures


@pytest.mark.parametrize("name", TWO_FILES)
def test_the_guidance_embedding_of_an_lcm_is_named(
    name: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, figures = answers(name, files, tmp_path, capsys, tuned=files["lcm"])
    (row,) = [row for row in figures["left_out"] if row["kind"] == "guidance"]
    assert (row["file"], row["count"], row["keys"]) == ("tuned", 1, [GUIDANCE])
    assert f"left out: the tuned file has 1 tensor of the guidance embedding of an LCM, in no offset ({GUIDANCE})" in text
    if "verdict" in figures and name != "compat":
        assert figures["verdict"]["level"] == "doubtful"
        assert text.count(GUIDANCE) == 2
        assert "Not the whole change: lcm has 1 tensor" in text


@pytest.mark.parametrize("name", TWO_FILES)
def test_what_is_normal_is_said_once_and_raises_no_doubt(
    name: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, figures = answers(name, files, tmp_path, capsys)
    kinds = {row["kind"]: row["count"] for row in figures["left_out"] if row["file"] == "base"}
    assert kinds == {"te1": 196, "vae": 248, "positions": 1, "schedule": 4}
    assert "left out: " not in text
    if name == "compat":
        assert "only UNets were compared" in text
        return
    assert text.count("not in the figures, of the base: ") == 1
    assert "196 tensors of the text encoder te1, which the other file does not hold" in text
    if "verdict" in figures:
        assert figures["verdict"]["level"] == "fits"


def test_equal_guidance_embeddings_are_no_doubt(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tuned = tiny.save(tmp_path / "t.safetensors", {**tiny.tuned(), f"{UNET}time_embed.cond_proj.weight": torch.ones(8, 4)})
    text, figures = answers("diff", files, tmp_path, capsys, base=files["lcm_base"], tuned=tuned)
    assert figures["verdict"]["level"] == "fits"
    assert "both files have 1 tensor of the guidance embedding of an LCM" in text
    assert "equal in both" in text
    other = tiny.save(tmp_path / "t.safetensors", {**tiny.tuned(), f"{UNET}time_embed.cond_proj.weight": torch.zeros(8, 4)})
    text, figures = answers("diff", files, tmp_path, capsys, base=files["lcm_base"], tuned=other)
    assert figures["verdict"]["level"] == "doubtful"
    assert "they differ" in text


def test_a_target_that_is_an_lcm(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, _ = answers("compat", files, tmp_path, capsys, target=files["lcm_base"])
    assert "left out: the target has 1 tensor of the guidance embedding" in text


def test_a_difference_in_the_guidance_embedding_alone(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    same = tiny.save(tmp_path / "same.safetensors", {**tiny.base(), f"{UNET}time_embed.cond_proj.weight": torch.ones(8, 4)})
    for name in ("diff", "offset", "extract"):
        output: list[object] = [] if name == "diff" else ["-o", tmp_path / "o.safetensors"]
        output += ["--rank", 2] if name == "extract" else []
        assert tiny.run(name, "--base", files["base"], "--tuned", same, *output) == 2
        assert "but same.safetensors has 1 tensor of the guidance embedding of an LCM" in capsys.readouterr().err


def test_broken_position_ids_are_no_change_of_a_text_encoder(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    wide, odd = tiny.base(), tiny.tuned()
    wide[key], odd[key] = torch.arange(77.0)[None], torch.arange(77.0)[None] * 0.99
    base, tuned = tiny.save(tmp_path / "b.safetensors", wide), tiny.save(tmp_path / "t.safetensors", odd)
    text, figures = answers("diff", files, tmp_path, capsys, base=base, tuned=tuned)
    assert figures["verdict"]["level"] == "fits"
    assert "1 number of positions, which are no weights" in text


# ---- inspect ----


def inspected(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    capsys.readouterr()
    figures = tiny.figures(folder / "report.json", "inspect", path)
    return capsys.readouterr().out, figures


def test_inspect_counts_all_keys(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, figures = inspected(files["base"], tmp_path, capsys)
    assert figures["contents"] == {"unet": 686, "te1": 196, "vae": 248}
    assert sum(figures["contents"].values()) + sum(row["count"] for row in figures["left_out"]) == figures["tensors"]
    assert "holds unet (686 tensors), te1 (196 tensors), vae (248 tensors)" in text
    assert "beside them " in text
    assert "4 constants of the noise schedule" in text
    text, figures = inspected(files["lcm"], tmp_path, capsys)
    assert figures["unmatched"] == [GUIDANCE]
    assert f"it holds 1 tensor of the guidance embedding of an LCM, in no offset ({GUIDANCE})" in text


def test_one_tensor_under_two_names(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = tiny.base()
    old = "cond_stage_model.transformer.final_layer_norm.weight"
    tensors[old] = tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"].clone()
    path = tiny.save(tmp_path / "twice.safetensors", tensors)
    text, figures = inspected(path, tmp_path, capsys)
    assert figures["contents"]["te1"] == 196
    assert "1 tensor that the file holds under two names" in text.replace("1 tensors", "1 tensor")


# ---- EMA copies ----


def with_ema(tensors: tiny.Tensors, factor: float) -> tiny.Tensors:
    """With an EMA copy under the names of ldm's LitEma, which drops the dots."""
    copies = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor * factor
        for key, tensor in tensors.items()
        if key.startswith(UNET)
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return {**tensors, **copies, **counters}


@pytest.mark.parametrize(("factor", "words"), [(1.0, "it is equal to them"), (0.5, "it differs from them")])
def test_inspect_says_how_an_ema_copy_stands(factor: float, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tiny.save(tmp_path / "ema.safetensors", with_ema(tiny.base(), factor), torch.float16)
    text, figures = inspected(path, tmp_path, capsys)
    assert words in text
    assert [row["count"] for row in figures["left_out"] if row["kind"] == "ema"] == [688]


def test_files_that_differ_in_their_ema_copies_alone(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one = tiny.save(tmp_path / "one.safetensors", with_ema(tiny.base(), 1.0))
    for factor, words in ((0.5, "the EMA copies beside them differ"), (1.0, "the EMA copies beside them are equal too")):
        other = tiny.save(tmp_path / "other.safetensors", with_ema(tiny.base(), factor))
        assert tiny.run("diff", "--base", one, "--tuned", other) == 2
        assert words in capsys.readouterr().err
    assert tiny.run("compat", "--target", one, "--base", one, "--tuned", files["base"]) == 2
    assert "one.safetensors alone has an EMA copy" in capsys.readouterr().err
