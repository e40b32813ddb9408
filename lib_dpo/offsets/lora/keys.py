"""The grammar of LoRA files: which part of which module a key is, and which keys belong to something else than LoRA.

Understood: kohya's, PEFT's (with an adapter's name too) and diffusers' names of all ages, and those of LyCORIS. A key is a
module's name and a suffix; only the suffix is looked at here, `aliases` knows the modules, `decompositions` what parts make up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lib_dpo.errors import MismatchError

PEFT_PAIR = re.compile(r"\.lora_[AB](\.|$)")  # PEFT's own spelling of a factor
_SIDES = {"up": "up", "down": "down", "mid": "mid", "B": "up", "A": "down"}
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<kohya>up|down|mid)\.weight"
    r"|lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight"  # the name of the adapter between: lora_A.default_0.weight
    r"|lora_(?P<bare>[AB])"
    r"|lora(?:_linear_layer)?\.(?P<diffusers>up|down)\.weight"
    r")"
)
# diffusers before 0.22; in a text encoder too, whose own names are q_proj and out_proj
_PROCESSOR = re.compile(r"(?P<head>.+?)(?:\.processor)?\.to_(?P<letter>q|k|v|out)_lora\.(?P<side>up|down)\.weight")
_PROCESSOR_ALPHA = re.compile(r"(?P<head>.+?)\.processor\.to_(?P<letter>q|k|v|out)\.alpha")  # as ComfyUI and Forge Neo read it
# the parts of other decompositions, LyCORIS's names and PEFT's; PEFT has its adapter's name behind, where it is not taken off
_DECOMPOSED = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<part>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)(?:\.(?!(?:alpha|bias|weight)$)[^.]+)?"
    r"|(?P<glora>[ab][12])\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
    r")"
)
_PLAIN = {
    "alpha": "alpha", "diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b", "dora_scale": "dora_scale",
}  # fmt: skip

# suffixes of decompositions that are not read: a file that holds one is refused, whatever else it holds
_DECOMPOSITIONS: Mapping[str, str] = {
    r"hada_\w+": "a LoHa of another kind",
    r"lokr_\w+": "a LoKr of another kind",
    r"b?oft_\w+(\..+)?": "OFT",
    r"bm\.weight": "a GLoRA of another kind",
    r"on_input|ia3_l(\..+)?": "IA3",
    r"vera_\w+(\..+)?": "VeRA",
    r"(randlora|vblora|fourierft|hra|delora|shira|c3a|road|bone|miss|waveft)_\w+(\..+)?": "another adapter of PEFT",
}
# suffixes of something beside a pair that changes what the pair means
_MODIFIERS: Mapping[str, str] = {
    r"lora_\w+(\.[^.]+)*\.bias|lora(_linear_layer)?\.(up|down)\.bias|\w+_lora\.(up|down)\.bias": "a bias inside a LoRA pair",
    r"set_weight": "a weight to be set, not added",
    r"reshape_weight": "a change of a weight's shape",
    r"scale|scalar|rescale": "a scale beside alpha",
    r"lora_embedding_[AB](\..+)?": "a LoRA of an embedding",
}


def _compiled(kinds: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(rf"\.({suffix})$"), kind) for suffix, kind in kinds.items()]


_TAIL = 200  # characters at the end of a key, in which its suffix lies: some patterns take the square of what they look at
_FOREIGN, _BESIDE = _compiled(_DECOMPOSITIONS), _compiled(_MODIFIERS)


@dataclass(frozen=True)
class Group:
    """The keys of one module under one spelling, by part: `alpha`, `diff_b`, and those that `decompositions` names."""

    module: str
    parts: dict[str, str]


def parse_key(key: str) -> tuple[str, str] | None:
    """The module and the part of a key; None for a suffix that is not known here."""
    if match := _FACTOR.fullmatch(key):
        side = match["kohya"] or match["peft"] or match["bare"] or match["diffusers"]
        return match["module"], _SIDES[side]
    if match := _PROCESSOR.fullmatch(key):
        return f"{match['head']}.{_projection(match['head'], match['letter'])}", match["side"]
    if match := _PROCESSOR_ALPHA.fullmatch(key):
        return f"{match['head']}.{_projection(match['head'], match['letter'])}", "alpha"
    if match := _DECOMPOSED.fullmatch(key):
        return match["module"], match["part"] or match["glora"] or "magnitude"
    module, _, suffix = key.rpartition(".")
    if not module or suffix not in _PLAIN:
        return None
    factor = parse_key(module) if suffix == "alpha" else None  # diffusers names alphas after the whole key of a factor
    return factor[0] if factor else module, _PLAIN[suffix]


def _projection(head: str, letter: str) -> str:
    """What `to_q_lora` stands for: the UNet's attention calls it to_q, a text encoder's q_proj."""
    if head.endswith("self_attn"):
        return f"{letter}_proj"
    return "to_out.0" if letter == "out" else f"to_{letter}"


def group_keys(keys: Iterable[str]) -> tuple[list[Group], list[str]]:
    """Keys by module and part, and those with no known suffix. A part that comes twice starts another group."""
    groups: list[Group] = []
    of_module: dict[str, list[Group]] = {}
    unknown = []
    for key in keys:
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        module, part = parsed
        own = of_module.setdefault(module, [])
        group = next((group for group in own if part not in group.parts), None)
        if group is None:
            group = Group(module, {})
            own.append(group)
            groups.append(group)
        group.parts[part] = key
    return groups, unknown


def is_lora(keys: Iterable[str]) -> bool:
    """Whether key names are those of a LoRA file or of another decomposition, also of one that is refused by name."""
    return any(_marks(key) for key in keys)


def _marks(key: str) -> bool:
    parsed = parse_key(key)
    return (parsed is not None and parsed[1] != "alpha") or any(pattern.search(key[-_TAIL:]) for pattern, _ in _FOREIGN)


def check_decomposition(keys: Iterable[str], name: str) -> None:
    """Refuse a file of a decomposition that is not read, and parts beside a pair that change its meaning.

    Args:
        name: the file, for messages.

    Raises:
        MismatchError: naming a key of it, and what it belongs to.
    """
    for key in keys:
        if parse_key(key) is not None:
            continue
        for pattern, kind in _FOREIGN:
            if pattern.search(key[-_TAIL:]):
                raise MismatchError(
                    f"{name}: {key} belongs to {kind}, which is not supported; expected LoRA, LoHa, LoKr, GLoRA or DoRA"
                )
        for pattern, kind in _BESIDE:
            if pattern.search(key[-_TAIL:]):
                raise MismatchError(
                    f"{name}: {key} is {kind}, which is not supported; without it the rest would mean something else: "
                    "expected a plain LoRA"
                )


def check_unknown_parts(keys: Iterable[str], is_module: Callable[[str], bool], name: str) -> None:
    """Refuse a key of a module that is read, or would be, whose own suffix is not known: its meaning would be lost.

    Args:
        keys: floating-point ones that `group_keys` knows no suffix of.
        is_module: whether a name is that of a module.
        name: the file, for messages.

    Raises:
        MismatchError: naming the key and the suffix.
    """
    for key in keys:
        module = key
        while "." in module:
            module = module.rpartition(".")[0]
            if is_module(module):
                raise MismatchError(
                    f"{name}: {key} is a part of {module} that is not understood ({key[len(module) + 1 :]}); expected pairs "
                    "(lora_up and lora_down, lora_B and lora_A), LoHa, LoKr, GLoRA, DoRA, alpha, diff, diff_b or norms only"
                )
