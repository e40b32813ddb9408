"""Names in LoRA files of others: every spelling, weights named twice, parts that change the meaning, what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_dpo.cli.text import bake_text, inspect_text, resize_text, verify_text
from lib_dpo.errors import MismatchError
from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import UNET
from lib_dpo.families.model import open_model
from lib_dpo.families.shapes import checkpoint_shapes
from lib_dpo.families.synthetic import small_pair
from lib_dpo.files.checkpoint import open_checkpoint
from lib_dpo.offsets.lora.aliases import find_module, lora_aliases, readable_modules
from lib_dpo.offsets.lora.file import read_lora
from lib_dpo.offsets.lora.keys import parse_key
from lib_dpo.offsets.lora.offset import open_offset
from lib_dpo.offsets.lora.unplaced import place_of, unplaced_lines
from lib_dpo.offsets.offset import open_pair
from lib_dpo.operations.bake import bake
from lib_dpo.operations.inspect import inspect
from lib_dpo.operations.resize import resize
from lib_dpo.operations.verify import verify
from lib_dpo.settings import RankPolicy
from tests.lora_files import (
    TE,
    TE_KEY,
    TO_Q,
    TO_Q_DOTTED,
    TO_Q_KEY,
    Tensors,
    kohya,
    pair,
    peft,
    pipeline_of,
    product,
    saved,
    tiny_unet,
)

SIZE = 48  # of a text encoder
SDXL_TE = "conditioner.embedders.{}"


def read(path: Path, key: str) -> torch.Tensor:
    with open_offset(path) as offset:
        assert not offset.unmatched
        return offset.read(key, torch.float64)


# ---- spellings ----


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_no_spelling_means_two_modules_and_every_spelling_is_found(arch: str) -> None:
    row = ARCHITECTURES[arch]
    owner: dict[str, Any] = {}
    for module in readable_modules(arch):
        for alias in lora_aliases(row, module):
            assert owner.setdefault(alias.replace(".", "_"), module) == module, alias
            assert find_module(arch, alias) == module, alias


@pytest.mark.parametrize(
    ("arch", "name", "key"),
    [
        *(("sd1", f"{prefix}{TE}", TE_KEY) for prefix in (
            "text_encoder.", "lora_te.", "lora_te1.", "clip_l.", "lora_clip_l.", "text_encoders.clip_l.", "base_model.model.",
            "text_encoders.clip_l.transformer.", "base_model.model.text_encoder.", "text_encoder.base_model.model.",
        )),
        *(("sd1", prefix + TE.replace(".", "_"), TE_KEY) for prefix in ("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_")),
        ("sd1", "text_encoder.encoder.layers.0.self_attn.q_proj", TE_KEY),  # transformers 5
        ("sd1", "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q", TO_Q_KEY),
        ("sd1", "lora_unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", TO_Q_KEY),
        ("sd1", "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", TO_Q_KEY),
        ("sdxl", "lora_te1_" + TE.replace(".", "_"), SDXL_TE.format("0.transformer." + TE)),
        ("sdxl", "lora_te_" + TE.replace(".", "_"), SDXL_TE.format("0.transformer." + TE)),
        ("sdxl", "text_encoders.clip_l.transformer." + TE, SDXL_TE.format("0.transformer." + TE)),
        ("sdxl", "clip_g.text_model.encoder.layers.3.mlp.fc1", SDXL_TE.format("1.model.transformer.resblocks.3.mlp.c_fc")),
        ("sdxl", "text_encoder_2.text_model.final_layer_norm", SDXL_TE.format("1.model.ln_final")),
        ("sd2", "lora_te_text_model_encoder_layers_0_mlp_fc2", "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj"),
        ("sdxl-refiner", "text_encoder.text_model.encoder.layers.30.mlp.fc2",
         "conditioner.embedders.0.model.transformer.resblocks.30.mlp.c_proj"),
    ],
)  # fmt: skip
def test_what_a_name_means(arch: str, name: str, key: str) -> None:
    module = find_module(arch, name)
    assert module is not None
    assert module.key.removesuffix(".weight") == key.removesuffix(".weight")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("a.b.lora_A.default_0.weight", ("a.b", "down")),
        ("a.b.lora_B.my-adapter.weight", ("a.b", "up")),
        ("a.b.lora_B", ("a.b", "up")),
        ("a.b.lora_linear_layer.down.weight", ("a.b", "down")),
        ("a.self_attn.to_q_lora.up.weight", ("a.self_attn.q_proj", "up")),
        ("a.self_attn.to_out_lora.down.weight", ("a.self_attn.out_proj", "down")),
        ("a.attn1.processor.to_out_lora.down.weight", ("a.attn1.to_out.0", "down")),
        ("a.attn1.to_k_lora.up.weight", ("a.attn1.to_k", "up")),
        ("a.attn1.processor.to_q_lora.down.weight.alpha", ("a.attn1.to_q", "alpha")),
        ("a.alpha", ("a", "alpha")),
        ("a.lora_B.bias", None),
        ("a.weight", None),
    ],
)
def test_which_part_a_key_is(key: str, meant: tuple[str, str] | None) -> None:
    assert parse_key(key) == meant


_OLD = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}


def spelled(style: str, module: str, up: torch.Tensor, down: torch.Tensor) -> Tensors:
    """One pair of a text encoder's module, such as encoder.layers.0.mlp.fc1, as diffusers of some age would have it."""
    full = f"text_model.{module}"
    last = module.rpartition(".")[2]
    if style == "kohya":
        return kohya("lora_te_" + full.replace(".", "_"), up, down, alpha=2.0)
    if style == "kohya te1":
        return kohya("lora_te1_" + full.replace(".", "_"), up, down, alpha=2.0)
    if style == "peft":
        return peft(f"text_encoder.{full}", up, down)
    if style == "transformers 5":
        return peft(f"text_encoder.{module}", up, down)
    if style == "oldest" and last in _OLD:
        name = f"text_encoder.{full.rpartition('.')[0]}.{_OLD[last]}"
    else:
        name = f"text_encoder.{full}.lora_linear_layer"
    return {f"{name}.up.weight": up, f"{name}.down.weight": down}


@pytest.mark.newest
@pytest.mark.parametrize("style", ["kohya", "kohya te1", "peft", "transformers 5", "old", "oldest"])
def test_a_text_encoders_part_is_what_diffusers_makes_of_it(tmp_path: Path, style: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        num_hidden_layers=2, hidden_size=SIZE, intermediate_size=4 * SIZE, num_attention_heads=2, vocab_size=64
    )
    encoder = CLIPTextModel(config)
    names = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    modules = {
        f"encoder.layers.{n}.{name}": encoder.get_submodule(f"encoder.layers.{n}.{name}") for n in (0, 1) for name in names
    }
    tensors: Tensors = {}
    before = {}
    for seed, (name, module) in enumerate(modules.items()):
        weight: Any = module.weight
        before[name] = weight.detach().clone()
        tensors |= spelled(style, name, *pair(*weight.shape, seed=seed))
    path = saved(tmp_path / "l.safetensors", tensors)
    pipeline = pipeline_of(tiny_unet(), encoder)
    pipeline.load_lora_weights(tmp_path, weight_name="l.safetensors")
    pipeline.fuse_lora(components=["text_encoder"])
    after = encoder.state_dict()
    for name, old in before.items():
        wanted = (after[f"{name}.base_layer.weight"] - old).double()
        got = read(path, f"cond_stage_model.transformer.text_model.{name}.weight")
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_text_projection_is_read_the_other_way_round(tmp_path: Path) -> None:
    """transformers keeps it as (out, in), open_clip as (in, out)."""
    up, down = pair(1280, 1280, rank=2)
    tensors = kohya("lora_te2_text_projection", up, down, alpha=1.0)
    tensors |= kohya("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", up, down)
    delta = read(saved(tmp_path / "l.safetensors", tensors), "conditioner.embedders.1.model.text_projection")
    torch.testing.assert_close(delta, product(up, down, 0.5).T)


def test_norms_of_a_text_encoder_are_read(tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_layer_norm1"
    path = saved(tmp_path / "l.safetensors", {f"{name}.w_norm": torch.ones(768), f"{name}.b_norm": torch.full((768,), 2.0)})
    key = "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1."
    assert float(read(path, key + "weight").mean()) == 1.0
    assert float(read(path, key + "bias").mean()) == 2.0


_MODULES = {
    arch: [module for module in readable_modules(arch) if len(checkpoint_shapes(arch)[module.key]) == 2 and module.part is None]
    for arch in ("sd1", "sdxl")
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_the_spellings_the_offset_is_the_sum_in_float64(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    arch = data.draw(st.sampled_from(sorted(_MODULES)))
    chosen = data.draw(st.lists(st.sampled_from(_MODULES[arch]), min_size=1, max_size=6, unique=True))
    tensors: Tensors = {}
    wanted = {}
    for seed, module in enumerate(chosen):
        up, down = pair(6, 5, rank=data.draw(st.integers(1, 4)), seed=seed)
        name = data.draw(st.sampled_from(lora_aliases(ARCHITECTURES[arch], module)))
        alpha = data.draw(st.sampled_from([None, 0.5, 1.0, 3.0]))
        suffix = data.draw(st.sampled_from(["kohya", "peft", "default_0", "old"]))
        if suffix == "old":
            tensors |= {f"{name}.lora_linear_layer.up.weight": up, f"{name}.lora_linear_layer.down.weight": down}
        else:
            tensors |= kohya(name, up, down) if suffix == "kohya" else peft(name, up, down, suffix.replace("peft", ""))
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        delta = product(up, down, 1.0 if alpha is None else alpha / down.shape[0])
        wanted[module.key] = delta.T if module.transposed else delta
    path = saved(tmp_path_factory.mktemp("spelled") / "l.safetensors", tensors)
    with open_offset(path, ARCHITECTURES[arch]) as offset:
        if offset.architecture.name == arch:  # a few names alone may be commoner elsewhere
            assert not offset.unmatched
            assert offset.shapes.keys() == wanted.keys()
            for key, delta in wanted.items():
                torch.testing.assert_close(offset.read(key, torch.float64), delta, atol=1e-12, rtol=1e-7)


# ---- one weight named twice ----

TWICE = [
    (kohya(TO_Q, *pair(), 4.0), kohya("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", *pair(), 4.0)),
    (kohya(TO_Q, *pair()), peft("unet." + TO_Q_DOTTED, *pair())),
    (peft(TO_Q_DOTTED, *pair()), peft(TO_Q_DOTTED, *pair(), "default")),
    (kohya(TO_Q, *pair(), 4.0), peft("unet." + TO_Q_DOTTED, *pair())),  # alpha 4 of rank 4, and none: both are 1
]


@pytest.mark.parametrize(("one", "other"), TWICE)
def test_the_same_numbers_under_two_names_count_once_and_are_told(tmp_path: Path, one: Tensors, other: Tensors) -> None:
    path = saved(tmp_path / "l.safetensors", one | other)
    torch.testing.assert_close(read(path, TO_Q_KEY), product(*pair()))
    found = inspect(path)
    assert len(found.twins) == len(one.keys() | other.keys()) - len(one)
    assert "say again what others say, and count once" in inspect_text(found)
    with open_checkpoint(path) as checkpoint:
        report = resize(checkpoint, tmp_path / "r.safetensors", RankPolicy(rank=4), precision="fp32")
    assert "repeat what others say" in resize_text(report)
    base, tuned = small_pair(tmp_path, "sd1")
    again = found.twins[0]
    with open_offset(path) as offset, open_model(base) as model, open_model(tuned) as other_model:
        baked = bake(model, offset, tmp_path / "b.safetensors")
        kept = verify(offset, open_pair(model, other_model))
    for text, figures in ((bake_text(baked), baked.as_json()), (verify_text(kept), kept.as_json())):
        assert again in text
        assert "say again what" in text or "says again what" in text
        assert figures["twins"] == list(found.twins)
    torch.testing.assert_close(read(tmp_path / "r.safetensors", TO_Q_KEY), product(*pair()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (kohya(TO_Q, *pair()), peft("unet." + TO_Q_DOTTED, *pair(seed=1))),
        (kohya(TO_Q, *pair(), 4.0), kohya("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", *pair(), 2.0)),
        (kohya(TO_Q, *pair(), 2.0), peft("unet." + TO_Q_DOTTED, *pair())),
        (peft(TO_Q_DOTTED, *pair(), "default_0"), peft(TO_Q_DOTTED, *pair(seed=1), "default_1")),
        (kohya("lora_te_" + TE.replace(".", "_"), *pair()), kohya("lora_te1_" + TE.replace(".", "_"), *pair(seed=1))),
    ],
)
def test_different_numbers_under_two_names_are_refused(tmp_path: Path, one: Tensors, other: Tensors) -> None:
    path = saved(tmp_path / "l.safetensors", one | other)
    with pytest.raises(MismatchError, match="name the same weight but differ"):
        open_offset(path)
    with open_checkpoint(path) as checkpoint, pytest.raises(MismatchError, match="name the same weight but differ"):
        resize(checkpoint, tmp_path / "r.safetensors", RankPolicy(rank=2))


def test_a_pair_and_a_whole_difference_of_one_module_are_refused(tmp_path: Path) -> None:
    """The WebUI's own loader takes the pair, ComfyUI and Forge the difference."""
    path = saved(tmp_path / "l.safetensors", kohya(TO_Q, *pair()) | {f"{TO_Q}.diff": torch.ones(32, 32)})
    with pytest.raises(MismatchError, match=r"a pair .* and a whole difference"):
        open_offset(path)


def test_a_pair_and_a_bias_of_one_module_are_both_read_under_two_names(tmp_path: Path) -> None:
    tensors = kohya(TO_Q, *pair()) | {f"unet.{TO_Q_DOTTED}.diff_b": torch.ones(32)}
    path = saved(tmp_path / "l.safetensors", tensors)
    torch.testing.assert_close(read(path, TO_Q_KEY), product(*pair()))
    assert float(read(path, TO_Q_KEY.replace("weight", "bias")).mean()) == 1.0


# ---- parts that change the meaning ----


@pytest.mark.parametrize(
    "suffix",
    [
        "oft_R.default.weight", "oft_blocks", "vera_lambda_b", "vera_lambda_d.default", "set_weight", "scale", "scalar", "bias",
        "lora_B.bias", "lora_B.default.bias", "lora_up.bias", "hada_w1_a.bias", "lokr_t1", "bm.weight", "lora_embedding_A",
        "on_input", "a1.weight", "weight", "bitfit", "diff_c",
        "modules_to_save.weight", "ia3_l.default", "weight_norm", "lora_alpha", "randlora_lambda.default",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [TO_Q, "lora_unet_mid_block_resnets_0_conv1"])  # beside the pair, and of a module without one
def test_a_part_that_is_not_understood_is_refused_by_name(tmp_path: Path, suffix: str, name: str) -> None:
    key = f"{name}.{suffix}"
    path = saved(tmp_path / "l.safetensors", kohya(TO_Q, *pair()) | {key: torch.ones(32)})
    with pytest.raises(MismatchError, match=key.replace(".", r"\.")):
        open_offset(path)
    if name == TO_Q:
        with open_checkpoint(path) as checkpoint, pytest.raises(MismatchError, match=key.replace(".", r"\.")):
            resize(checkpoint, tmp_path / "r.safetensors", RankPolicy(rank=2))


def test_the_alpha_of_a_processors_pair_is_read_as_hosts_read_it(tmp_path: Path) -> None:
    """ComfyUI and Forge Neo ask for `X.alpha` of X_lora.up.weight (load_lora in comfy/lora.py)."""
    up, down = pair()
    name = "unet." + TO_Q_DOTTED.replace("attn1.", "attn1.processor.")
    tensors = {f"{name}_lora.up.weight": up, f"{name}_lora.down.weight": down, f"{name}.alpha": torch.tensor(1.0)}
    found = read(saved(tmp_path / "old.safetensors", tensors), TO_Q_KEY)
    torch.testing.assert_close(found, product(up, down, 1 / 4))


@pytest.mark.parametrize("end", ["_lora.alpha", "_lora.network_alpha", ".lora_alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_an_alpha_under_a_name_that_nobody_reads_is_refused(tmp_path: Path, end: str, dtype: torch.dtype) -> None:
    up, down = pair()
    name = "unet." + TO_Q_DOTTED
    tensors = {f"{name}_lora.up.weight": up, f"{name}_lora.down.weight": down, f"{name}{end}": torch.tensor(1, dtype=dtype)}
    with pytest.raises(MismatchError, match="is not understood"):
        read(saved(tmp_path / "strange.safetensors", tensors), TO_Q_KEY)


def test_a_core_that_is_not_square_has_the_rank_of_down(tmp_path: Path) -> None:
    """As `dim` of A1111 (network_lora.py) and mat2.shape[0] of ComfyUI; LyCORIS writes square cores."""
    generator = torch.Generator().manual_seed(0)
    up, core, down = (torch.randn(shape, generator=generator) for shape in ((32, 6, 1, 1), (6, 4, 3, 3), (4, 32, 1, 1)))
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": core, f"{name}.lora_down.weight": down}
    path = saved(tmp_path / "tucker.safetensors", tensors | {f"{name}.alpha": torch.tensor(2.0)})
    found = read(path, UNET + "input_blocks.1.0.in_layers.2.weight")
    by_hand = torch.einsum(
        "or,rshw,si->oihw", *(x.double().squeeze() if x is not core else x.double() for x in (up, core, down))
    )
    torch.testing.assert_close(found, by_hand * 2 / 4, rtol=1e-6, atol=1e-6)


def test_factors_of_exponents_alone_keep_their_range(tmp_path: Path) -> None:
    """float8_e8m0fnu: powers of two of which float16 holds few."""
    kind = getattr(torch, "float8_e8m0fnu", None)
    if kind is None:
        pytest.skip("this torch has no such numbers")
    up, down = torch.full((32, 4), 2.0**-26), pair()[1]
    path = saved(tmp_path / "e8m0.safetensors", kohya(TO_Q, up.to(kind), down))
    torch.testing.assert_close(read(path, TO_Q_KEY), product(up, down))


def test_a_reshaped_weight_is_refused_though_it_is_whole_numbers(tmp_path: Path) -> None:
    tensors = kohya(TO_Q, *pair()) | {f"{TO_Q}.reshape_weight": torch.tensor([32, 64])}
    with pytest.raises(MismatchError, match="change of a weight's shape"):
        open_offset(saved(tmp_path / "l.safetensors", tensors))


# ---- what is left out ----


def test_a_text_encoders_part_that_is_not_understood_is_named_as_such(tmp_path: Path) -> None:
    tensors = kohya(TO_Q, *pair()) | kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", *pair())
    tensors |= {"bundle_emb.cat.emb": torch.ones(4)}
    found = inspect(saved(tmp_path / "l.safetensors", tensors))
    words = inspect_text(found)
    assert "the text encoder's part is missing or incomplete: 2 keys are not understood or have no place here" in words
    assert "left out: 1 key of no part of a model that is known here, first bundle_emb.cat.emb" in words
    assert set(found.unmatched) == tensors.keys() - kohya(TO_Q, *pair()).keys()


def test_an_alpha_without_a_pair_is_named(tmp_path: Path) -> None:
    tensors = kohya(TO_Q, *pair()) | {"lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(1.0)}
    assert inspect(saved(tmp_path / "l.safetensors", tensors)).unmatched == ("lora_unet_mid_block_resnets_0_conv1.alpha",)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("lora_te2_text_projection.alpha", "text encoder"),
        ("lycoris_te_x.alpha", "text encoder"),
        ("cond_stage_model.transformer.x", "text encoder"),
        ("text_encoders.clip_l.x", "text encoder"),
        ("lora_unet_x.diff", "UNet"),
        ("model.diffusion_model.time_embed.cond", "UNet"),
        ("down_blocks.0.x", "UNet"),
        ("first_stage_model.x", "VAE"),
        ("bundle_emb.x", ""),
        ("latent", ""),
    ],
)
def test_which_part_of_a_model_a_key_names(key: str, place: str) -> None:
    assert place_of(key) == place


def test_nothing_left_out_is_nothing_said() -> None:
    assert unplaced_lines([]) == []


# ---- architectures that share names ----

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"


@pytest.mark.parametrize(("columns", "title"), [(768, "SD 1.x"), (1024, "SD 2.x")])
def test_the_width_of_cross_attention_tells_sd2_from_sd1(tmp_path: Path, columns: int, title: str) -> None:
    tensors = kohya(ATTENTION + "attn1_to_q", *pair(320, 320)) | kohya(ATTENTION + "attn2_to_k", *pair(320, columns))
    found = inspect(saved(tmp_path / "l.safetensors", tensors))
    assert found.family == title
    assert found.architecture == {"SD 1.x": "sd1", "SD 2.x": "sd2"}[title]


def test_names_that_say_no_more_are_called_by_all_that_they_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "l.safetensors", kohya(ATTENTION + "attn1_to_q", *pair(320, 320)))
    found = inspect(path)
    assert found.architecture is None
    assert "a LoRA, SD 1.x or SD 2.x, kohya layout" in inspect_text(found)
    with open_checkpoint(path) as checkpoint:
        assert read_lora(checkpoint, ARCHITECTURES["sd2"]).architecture.name == "sd2"


@pytest.mark.parametrize(
    ("prefix", "version", "wanted", "found"),
    [
        ("lora_te_", "", "sdxl", "sd1"),
        ("lora_te_", "sdxl_base_v1-0", "sdxl", "sdxl"),
        ("lora_te_", "sdxl_base_v1-0", "sd1", "sdxl"),
        ("lora_te_", "", "sdxl-refiner", "sdxl-refiner"),
        ("lora_te1_", "", "sd1", "sd1"),  # diffusers reads and writes it for both
        ("lora_te1_", "", "sdxl", "sdxl"),
        ("lycoris_te_", "", "sdxl", "sdxl"),
    ],
)
def test_what_is_wanted_does_not_outweigh_whose_names_they_are(
    tmp_path: Path, prefix: str, version: str, wanted: str, found: str
) -> None:
    """sd-scripts numbers the text encoders of SDXL: without a number it is a LoRA of SD 1, though SDXL's loaders read it."""
    tensors = kohya(prefix + TE.replace(".", "_"), *pair())
    path = saved(tmp_path / "l.safetensors", tensors, {"ss_base_model_version": version} if version else None)
    with open_checkpoint(path) as checkpoint:
        assert read_lora(checkpoint, ARCHITECTURES[wanted]).architecture.name == found


def test_metadata_tells_where_names_do_not(tmp_path: Path) -> None:
    tensors = kohya(ATTENTION + "attn1_to_q", *pair(320, 320))
    assert inspect(saved(tmp_path / "l.safetensors", tensors, {"ss_v2": "True"})).family == "SD 2.x"


@pytest.mark.parametrize(("version", "found"), [("sd_v1", "sd1"), ("sdxl_base_v1-0", "sdxl"), ("", "sd1")])
def test_a_text_encoder_that_two_families_share_is_of_the_one_that_the_metadata_names(
    version: str, found: str, tmp_path: Path
) -> None:
    """CLIP-L is SD 1's text encoder and one of SDXL's, whose own names are numbered: these are SD 1's without a word."""
    tensors = kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", *pair(3072, 768))
    path = saved(tmp_path / "l.safetensors", tensors, {"ss_base_model_version": version} if version else None)
    with open_checkpoint(path) as checkpoint:
        assert read_lora(checkpoint, ARCHITECTURES["sdxl"]).architecture.name == found
