"""Any mixture of LoRA keys: each is applied, or named as a copy or left out, or the file is refused. Long: `make fuzz`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fuzzing import inputs, tried
from hypothesis import given
from hypothesis import strategies as st
from lora_files import Tensors, saved

from lib_dpo.families.arch import ARCHITECTURES
from lib_dpo.families.keymap import LoraModule
from lib_dpo.families.shapes import checkpoint_shapes
from lib_dpo.offsets.lora.aliases import lora_aliases, readable_modules
from lib_dpo.offsets.lora.offset import open_offset

ARCH = ARCHITECTURES["sd1"]
SHAPES = checkpoint_shapes("sd1")
MATRICES = [each for each in readable_modules("sd1") if len(SHAPES[each.key]) == 2 and each.part is None]
CONVOLUTIONS = [each for each in readable_modules("sd1") if SHAPES[each.key][2:] == (3, 3)]
OUT, IN = 6, 5
CHANGE = st.sampled_from(["none", "none", "none", "lose", "shape", "again", "again differently", "retype", "rename", "nan"])


@dataclass(frozen=True)
class Written:
    """One module as it was written: its keys, and what it adds by the definition of its form, float64 (out, in)."""

    module: LoraModule
    tensors: Tensors
    delta: torch.Tensor


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def modules(draw: st.DrawFn, seed: int) -> Written:
    """A module of any form under any of its names."""
    is_conv = draw(st.booleans())
    module = draw(st.sampled_from(CONVOLUTIONS if is_conv else MATRICES))
    name = draw(st.sampled_from(lora_aliases(ARCH, module)))
    rank, alpha = draw(st.integers(1, 4)), draw(st.sampled_from([None, 0.0, 0.5, 1.0, 3.0, -2.0]))
    form = draw(st.sampled_from(["kohya", "peft", "adapter", "linear_layer", "bare", "loha", "lokr", "lokr_ab", "diff", "cp"]))
    kernel = (3, 3) if is_conv else ()
    spelled = {
        "kohya": ("lora_up.weight", "lora_down.weight"), "peft": ("lora_B.weight", "lora_A.weight"),
        "adapter": ("lora_B.default_0.weight", "lora_A.default_0.weight"), "bare": ("lora_B", "lora_A"),
        "linear_layer": ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
        "cp": ("lora_up.weight", "lora_down.weight"),
    }  # fmt: skip
    scale = 1.0 if alpha is None else alpha / rank
    if form in spelled:
        up = _random(OUT, rank, *(1 for _ in kernel), seed=seed)
        if form == "cp" and is_conv:
            down, mid = _random(rank, IN, 1, 1, seed=seed + 1), _random(rank, rank, 3, 3, seed=seed + 2)
            found = {f"{name}.{end}": part for end, part in zip(spelled[form], (up, down), strict=True)}
            found[f"{name}.lora_mid.weight"] = mid
            whole = torch.einsum("oa,abhw,bi->oihw", up.flatten(1).double(), mid.double(), down.flatten(1).double())
        else:
            down = _random(rank, IN, *kernel, seed=seed + 1)
            found = {f"{name}.{end}": part for end, part in zip(spelled[form], (up, down), strict=True)}
            whole = up.flatten(1).double() @ down.flatten(1).double()
    elif form == "diff":
        whole, scale = _random(OUT, IN, *kernel, seed=seed).double(), 1.0
        found = {f"{name}.diff": whole.float()}
    elif form == "loha":
        parts = [_random(*size, seed=seed + n) for n, size in enumerate(((OUT, rank), (rank, IN * 9 if is_conv else IN)) * 2)]
        found = {f"{name}.hada_w{1 + n // 2}_{'ab'[n % 2]}": part for n, part in enumerate(parts)}
        first, second = (parts[n].double() @ parts[n + 1].double() for n in (0, 2))
        whole = first * second
    else:
        left = _random(2, 1, seed=seed)
        if form == "lokr":
            right, scale = _random(3, IN, *kernel, seed=seed + 1), 1.0
            found = {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right}
        else:
            pair = _random(3, rank, seed=seed + 1), _random(rank, IN * 9 if is_conv else IN, seed=seed + 2)
            found = {f"{name}.lokr_w1": left, f"{name}.lokr_w2_a": pair[0], f"{name}.lokr_w2_b": pair[1]}
            right = pair[0].double() @ pair[1].double()
        whole = torch.kron(left.double(), right.double().flatten(1))
    if alpha is not None:
        found[f"{name}.alpha"] = torch.tensor(alpha)
    delta = scale * whole.flatten(1)
    return Written(module, found, delta.T if module.transposed else delta)


@st.composite
def files(draw: st.DrawFn) -> tuple[Tensors, dict[str, torch.Tensor] | None]:
    """The tensors of a file, and what it adds by canonical key; None where something in it was spoilt."""
    chosen = [draw(modules(100 * number)) for number in range(draw(st.integers(1, 5)))]
    unique = {row.module.key: row for row in chosen}
    tensors = {key: tensor for row in unique.values() for key, tensor in row.tensors.items()}
    wanted = {row.module.key: row.delta for row in unique.values()}
    is_spoilt = False
    for number in range(draw(st.integers(0, 2))):
        key, how = draw(st.sampled_from(sorted(tensors))), draw(CHANGE)
        is_spoilt |= how != "none"
        if how == "lose" and len(tensors) > 1:
            del tensors[key]
        elif how == "shape":
            shape = draw(st.sampled_from([(), (0,), (1,), (7,), (6, 5), (2, 2), (6, 5, 1, 1), (6, 5, 3), (1, 1, 1, 1, 1)]))
            tensors[key] = torch.ones(shape)
        elif how in ("again", "again differently"):
            row = draw(st.sampled_from(sorted(unique.values(), key=lambda row: row.module.key)))
            other = draw(st.sampled_from(lora_aliases(ARCH, row.module)))
            for own, tensor in row.tensors.items():
                tensors[other + own[len(_module_of(own)) :]] = tensor + number if how != "again" else tensor
        elif how == "retype":
            tensors[key] = tensors[key].to(draw(st.sampled_from([torch.int8, torch.bool, torch.float64, torch.bfloat16])))
        elif how == "rename":
            tensors[draw(st.text(max_size=12) | st.sampled_from([key + ".weight", "x" + key, key.replace("_", "")]))] = (
                tensors.pop(key)
            )
        elif how == "nan":
            tensors[key] = torch.full_like(tensors[key], float("nan")) if tensors[key].is_floating_point() else tensors[key]
    tensors.pop("__metadata__", None)
    return tensors or {"a": torch.ones(1)}, None if is_spoilt else wanted


def _module_of(key: str) -> str:
    return re.split(r"\.(?:lora_|hada_|lokr_|diff$|alpha$)", key)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@inputs(60)
@given(made=files())
def test_every_key_is_applied_or_named(folder: Path, made: tuple[Tensors, dict[str, torch.Tensor] | None]):
    tensors, wanted = made
    path = saved(folder / "any lora.safetensors", tensors)
    read, refusal = tried(_read, path)
    if read is None:
        assert wanted is None, f"refused, though nothing is wrong with it: {refusal}"
        assert path.stem in refusal
        return
    applied, named, canonical, is_ours = read
    assert named <= tensors.keys()
    if is_ours and wanted is not None:  # a few names alone may be commoner elsewhere
        assert not named
        assert canonical == wanted.keys()
        for key, delta in wanted.items():
            torch.testing.assert_close(applied[key].flatten(1), delta, atol=1e-6, rtol=1e-5)
    elif is_ours:
        silent = [key for key in tensors if key not in named and not _counts(key, canonical)]
        assert not silent, "neither applied nor named"


def _read(path: Path) -> tuple[dict[str, torch.Tensor], set[str], set[str], bool]:
    """What a file adds by canonical key, the keys that it leaves out by name, all that it changes, and whether it is ARCH."""
    with open_offset(path, ARCH) as offset:
        applied = {key: offset.read(key, torch.float64) for key in offset.shapes if key not in offset.bound}
        return applied, {*offset.unmatched, *offset.twins}, set(offset.shapes), offset.architecture is ARCH


def _counts(key: str, canonical: set[str]) -> bool:
    """Whether a key is of a module that the offset changes: found by its names, not by the reader's own look-up."""
    flat = _module_of(key).replace(".", "_")
    return any(
        flat in _flat_names(each) for each in (*MATRICES, *CONVOLUTIONS) if each.key in canonical or each.bias in canonical
    )


_NAMES: dict[str, set[str]] = {}


def _flat_names(module: LoraModule) -> set[str]:
    if module.name not in _NAMES:
        _NAMES[module.name] = {name.replace(".", "_") for name in lora_aliases(ARCH, module)}
    return _NAMES[module.name]
