"""Every spelling under which LoRA files name a module, by rule: the prefixes of a component times the names inside it.

Dots and underscores count alike: kohya writes `_` everywhere, OneTrainer `.` after its prefixes, PEFT and diffusers `.`.

Sources of the spellings: kohya-ss/sd-scripts networks/lora.py, KohakuBlueleaf/LyCORIS wrapper.py and kohya.py,
huggingface/diffusers loaders/lora_conversion_utils.py and utils/state_dict_utils.py, huggingface/peft,
comfyanonymous/ComfyUI comfy/lora.py, Nerogar/OneTrainer modules/util/convert/lora.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from lib_dpo.families.arch import ARCHITECTURES, Architecture, TextEncoder
from lib_dpo.families.keymap import QKV, UNET, LoraModule, fused_layer, lora_modules, text_encoder_to_hf, unet_to_diffusers
from lib_dpo.families.shapes import checkpoint_shapes

_PEFT = "base_model.model."
_TEXT_MODEL = "text_model."  # transformers 5 leaves it out where the model is a CLIPTextModel
_UNET_PREFIXES = (
    "", "unet.", "lora_unet.", "lycoris.", "lycoris_unet.", "diffusion_model.", UNET, _PEFT, _PEFT + "unet.", "unet." + _PEFT,
)  # fmt: skip


def find_module(arch_name: str, name: str) -> LoraModule | None:
    """The module of an architecture that a LoRA file means by a name; None where it has none of that name."""
    flat = _flat(name)
    for prefix, modules in _spellings(arch_name):
        if flat.startswith(prefix):
            module = modules.get(flat[len(prefix) :])
            if module is not None:
                return module
    return None


def lora_aliases(arch: Architecture, module: LoraModule) -> tuple[str, ...]:
    """Every spelling of a module that is read, as files write them: with dots, and kohya's with underscores."""
    encoder = _encoder_of(arch, module.key)
    stems = list(_text_stems(encoder, module) if encoder else _unet_stems(arch, module))
    prefixes = _text_prefixes(arch, encoder) if encoder else _UNET_PREFIXES
    names = [module.name, *(prefix + stem for prefix in prefixes for stem in stems)]
    flat = [_flat(name) for name in names if name.startswith(("lora_", "lycoris"))]
    return tuple(dict.fromkeys([*names, *flat]))


@cache
def readable_modules(arch_name: str) -> tuple[LoraModule, ...]:
    """Every module that LoRA files may change: all weights, norms and embeddings of UNet and text encoders."""
    arch = ARCHITECTURES[arch_name]
    found: list[LoraModule] = []
    for key in checkpoint_shapes(arch_name):
        written = lora_modules(arch, key)
        encoder = _encoder_of(arch, key)
        if not written and encoder:
            hf = "text_projection.weight" if _is_projection(encoder, key) else text_encoder_to_hf(encoder, key)
            if hf is not None and hf.endswith(".weight"):
                name = f"{encoder.kohya}_{_flat(hf[: -len('.weight')])}"
                written = (LoraModule(name, key, transposed=_is_projection(encoder, key)),)
        found += written
    return tuple(found)


@cache
def _spellings(arch_name: str) -> tuple[tuple[str, Mapping[str, LoraModule]], ...]:
    """Flat prefixes, the longest first, each with the modules below it by flat name."""
    arch = ARCHITECTURES[arch_name]
    found: dict[str, dict[str, LoraModule]] = {}
    for module in readable_modules(arch_name):
        encoder = _encoder_of(arch, module.key)
        stems = [_flat(stem) for stem in (_text_stems(encoder, module) if encoder else _unet_stems(arch, module))]
        for prefix in _text_prefixes(arch, encoder) if encoder else _UNET_PREFIXES:
            below = found.setdefault(_flat(prefix), {})
            below.update(dict.fromkeys(stems, module))
    return tuple(sorted(found.items(), key=lambda item: -len(item[0])))


def _flat(name: str) -> str:
    return name.replace(".", "_")


# ---- UNet ----


def _unet_stems(arch: Architecture, module: LoraModule) -> Iterator[str]:
    dotted = module.key[: -len(".weight")]
    yield dotted[len(UNET) :]
    diffusers = unet_to_diffusers(arch, dotted)
    if diffusers is not None:
        yield diffusers


# ---- text encoders ----


def _encoder_of(arch: Architecture, key: str) -> TextEncoder | None:
    return next((encoder for encoder in arch.text_encoders if key.startswith(encoder.prefix)), None)


def _is_projection(encoder: TextEncoder, key: str) -> bool:
    return encoder.naming == "open_clip" and key == encoder.prefix + "text_projection"


def _text_stems(encoder: TextEncoder, module: LoraModule) -> Iterator[str]:
    """Names inside an encoder: of transformers, with and without its outer module, and of open_clip."""
    if module.transposed:
        yield "text_projection"
        return
    layer = fused_layer(encoder, module.key)
    if layer is not None:
        assert module.part is not None, "a fused layer is read in parts"
        hf: str | None = f"{_TEXT_MODEL}encoder.layers.{layer}.self_attn.{QKV[module.part]}_proj"
    else:
        hf = text_encoder_to_hf(encoder, module.key.removesuffix(".weight"))
    if hf is not None:
        hf = hf.removesuffix(".weight")  # open_clip's positional_embedding has no module of its own
        yield hf
        yield hf[len(_TEXT_MODEL) :]
    if encoder.naming == "open_clip" and module.key.endswith(".weight"):
        yield module.key[len(encoder.prefix) : -len(".weight")]


def _text_prefixes(arch: Architecture, encoder: TextEncoder) -> Iterator[str]:
    """What stands before a name inside an encoder. A lone encoder needs no number, and no name at all from PEFT."""
    lone = len(arch.text_encoders) == 1
    number = 1 + arch.text_encoders.index(encoder)
    numbers = ("1", "") if number == 1 else (str(number),)
    folders = {encoder.folder, *({"text_encoder"} if number == 1 else ())}
    comfy = "clip_l" if encoder.naming == "hf" else "clip_h" if arch.name.startswith("sd2") else "clip_g"
    kohya = {
        encoder.kohya,
        *(f"lora_te{digit}" for digit in numbers),
        f"lora_{comfy}",
        *({"lora_te2"} if comfy == "clip_g" else ()),
    }
    for root in sorted(kohya | folders | {comfy}):
        yield root + "."
    for root in sorted(folders):
        yield f"{_PEFT}{root}."
        yield f"{root}.{_PEFT}"
        yield f"lycoris_{root}."
    yield from (f"lycoris_te{digit}." for digit in numbers)
    yield from (f"text_encoders.{comfy}.", f"text_encoders.{comfy}.transformer.")
    yield encoder.prefix.removesuffix(_TEXT_MODEL)  # the checkpoint's own
    if lone:
        yield from ("", _PEFT, "lycoris.")
