"""The folders of a WebUI with what the tests need in them: random checkpoints, a DPO reference, and files to refuse.

Weights are scaled so that activations keep their size (1/sqrt of what a neuron sees): pictures are noise, but not NaN, and
they answer to prompt, checkpoint and offset.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from flavours import Flavour
from safetensors.torch import save_file

from lib_dpo.cli.main import main
from lib_dpo.families.arch import ARCHITECTURES, Shape
from lib_dpo.families.keymap import VAE, lora_modules
from lib_dpo.families.shapes import (
    REAL_SIZES,
    Sizes,
    checkpoint_dtype,
    checkpoint_shapes,
    unet_diffusers_config,
    unet_name_pairs,
)
from lib_dpo.families.synthetic import base_tensor, offset_tensor, small_pair
from lib_dpo.files.header import torch_dtype
from lib_dpo.files.writer import SafetensorsWriter

MICRO = Sizes(channels=32, text=(64,), vae=32)  # group norms have 32 groups: no model is narrower
MICRO_XL = Sizes(channels=32, text=(64, 64), vae=32)
BASE, OTHER, OTHER_VAE, REFERENCE = "base.safetensors", "other.safetensors", "another-vae.safetensors", "dpo-sd15"
TEXT_LORA, XL_LORA, BROKEN = "text", "xl", "broken"
XL_BASE, XL_REFERENCE, XL_TEXT_LORA = "xl-base.safetensors", "dpo-sdxl", "xl-text"
_OFFSET_SHARE = 0.03  # of the weights' rms: about what DPO does, and seen in a picture of two steps
_SPECTRUM = 1.0  # sigma_i ~ 1/i: steeper than DPO's, so that small ranks keep enough to be seen
_CLIP = "openai/clip-vit-large-patch14"
_SETTINGS = {
    "sd_model_checkpoint": BASE,
    "live_previews_enable": False,
    "show_progress_every_n_steps": -1,
    "auto_launch_browser": "Disable",
    "samples_save": False,
    "grid_save": False,
    "forge_preset": "sd",
}


def make_data(folder: Path, flavour: Flavour, webui: Path, python: Path, *, full: bool = False) -> Path:
    """A data folder for --data-dir. Models that are there already are kept; settings and caches of another run are not.

    Args:
        full: checkpoints of the real size (2.1 GB each, and 3.4 GB for the reference) also where small ones do.
    """
    sizes = MICRO if flavour.any_width and not full else REAL_SIZES["sd1"]
    models = folder / "models"
    for old in folder.iterdir() if folder.exists() else ():
        if old.name not in ("models", "hf", "clip"):
            remove(old)
    _check_disk(folder, 16e9 if sizes is REAL_SIZES["sd1"] else 1e9)
    for name, seed in ((BASE, 1), (OTHER, 2)):
        _checkpoint(models / "Stable-diffusion" / name, "sd1", sizes, seed)
    _vae(models / "VAE" / OTHER_VAE, sizes, seed=3)
    _reference(models / "DPO" / REFERENCE / "unet", "sd1", sizes, seed=1)
    (models / "Lora").mkdir(exist_ok=True)
    _text_lora(models / "Lora" / f"{TEXT_LORA}.safetensors", "sd1", sizes)
    _xl_lora(models / "Lora" / f"{XL_LORA}.safetensors", folder / "xl")
    for broken in (models / "Lora" / f"{BROKEN}.safetensors", models / "DPO" / f"{BROKEN}-offset.safetensors"):
        broken.write_bytes((2000).to_bytes(8, "little") + b'{"lora_unet_x.lora_up.weight": {"dtype":"F16"')
    if not flavour.own_tokenizer:
        vocabulary = _vocabulary(python)
        snapshot = folder / "hf" / "hub" / f"models--{_CLIP.replace('/', '--')}"
        _tokenizer(snapshot / "snapshots" / "1", vocabulary, width=768)
        (snapshot / "refs").mkdir(exist_ok=True)
        (snapshot / "refs" / "main").write_text("1")
        if sizes is MICRO:
            _tokenizer(folder / "clip", vocabulary, width=MICRO.text[0])
            (folder / "micro.yaml").write_text(_micro_config(webui, folder / "clip"))
    (folder / "config.json").write_text(json.dumps(_SETTINGS | _generation_of_settings(webui)))
    (folder / "styles.csv").touch()
    for name in (BASE, OTHER):
        describe(folder, name)
    return folder


def _generation_of_settings(webui: Path) -> dict[str, str]:
    """What Forge Neo wants in its settings: without it, or with another, it waits for somebody to press Enter."""
    source = webui / "modules" / "launch_utils.py"
    found = re.search(r"^VERSION_UID\b.*=\s*[\"'](\w+)[\"']", source.read_text(encoding="utf-8"), re.MULTILINE)
    return {"VERSION_UID": found[1]} if found else {}


def add_sdxl(data: Path, flavour: Flavour, webui: Path) -> None:
    """The same of SDXL, small where the host takes it so, else of the real size: 7 GB, and 10 GB for the reference."""
    sizes, models = MICRO_XL if flavour.any_width else REAL_SIZES["sdxl"], data / "models"
    _check_disk(data, 1e9 if sizes is MICRO_XL else 45e9)  # with what is there already, and a saved checkpoint
    _checkpoint(models / "Stable-diffusion" / XL_BASE, "sdxl", sizes, seed=4)
    _reference(models / "DPO" / XL_REFERENCE / "unet", "sdxl", sizes, seed=4)
    _text_lora(models / "Lora" / f"{XL_TEXT_LORA}.safetensors", "sdxl", sizes)
    if sizes is MICRO_XL:
        described = (models / "Stable-diffusion" / XL_BASE).with_suffix(".yaml")
        described.write_text(_micro_xl_config(webui, data / "clip"))


def describe(data: Path, checkpoint: str) -> None:
    """Put the description of its widths beside a small checkpoint; real ones need none."""
    if (data / "micro.yaml").exists():
        shutil.copy(data / "micro.yaml", data / "models" / "Stable-diffusion" / Path(checkpoint).with_suffix(".yaml").name)


# ---- weights ----


def _weight(key: str, shape: Shape, seed: int) -> torch.Tensor:
    if len(shape) > 1 and "embedding" not in key:
        return base_tensor(key, shape, seed=seed, rms=1 / math.sqrt(math.prod(shape[1:])))
    # a last norm of CLIP at 1 and 0 gives conds of mean 0, by which A1111 divides
    return base_tensor(key, shape, seed=seed, rms=0.1 if len(shape) == 1 else 0.02)


def _offset(key: str, shape: Shape, seed: int) -> torch.Tensor:
    rms = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return offset_tensor(key, shape, seed=seed, rms=_OFFSET_SHARE * rms, exponent=_SPECTRUM)


def _checkpoint(path: Path, arch: str, sizes: Sizes, seed: int) -> None:
    shapes = checkpoint_shapes(arch, sizes)
    dtypes = {key: torch_dtype(checkpoint_dtype(key)) for key in shapes}
    keys = sorted(shapes, key=lambda key: -dtypes[key].itemsize)  # readers like tensors at multiples of their item size
    _write(path, ((key, _weight(key, shapes[key], seed).to(dtypes[key])) for key in keys), len(keys))


def _vae(path: Path, sizes: Sizes, seed: int) -> None:
    shapes = {key: shape for key, shape in checkpoint_shapes("sd1", sizes).items() if key.startswith(VAE)}
    _write(path, ((key[len(VAE) :], _weight(key, shape, seed).half()) for key, shape in shapes.items()), len(shapes))


def _reference(folder: Path, arch: str, sizes: Sizes, seed: int) -> None:
    """As published: the UNet alone, in float32, under the names of diffusers."""
    shapes, names = checkpoint_shapes(arch, sizes), unet_name_pairs(arch)
    rows = ((name, _weight(key, shapes[key], seed) + _offset(key, shapes[key], seed)) for key, name in names.items())
    _write(folder / "diffusion_pytorch_model.safetensors", rows, len(names))
    (folder / "config.json").write_text(json.dumps(unet_diffusers_config(arch, sizes)))


def _write(path: Path, rows: Iterator[tuple[str, torch.Tensor]], count: int) -> None:
    if not path.exists():
        with SafetensorsWriter(path, expected_bytes=0, max_tensors=count, max_metadata_bytes=4096) as out:
            for key, tensor in rows:
                out.add(key, tensor)
            out.finish({"format": "pt"})


def _text_lora(path: Path, arch: str, sizes: Sizes) -> None:
    """A LoRA of the text encoders alone: the first MLP layers, and of CLIP-G q, k, v (one weight in the file) and out."""
    architecture, rank = ARCHITECTURES[arch], 4
    fused = tuple(encoder.prefix for encoder in architecture.text_encoders if encoder.naming == "open_clip")
    tensors: dict[str, torch.Tensor] = {}
    for key, shape in checkpoint_shapes(arch, sizes).items():
        in_mlp = key.endswith((".mlp.fc1.weight", ".mlp.c_fc.weight"))
        if not in_mlp and not (key.startswith(fused) and key.endswith((".attn.in_proj_weight", ".attn.out_proj.weight"))):
            continue
        for module in lora_modules(architecture, key):
            size = (shape[0] if module.part is None else shape[0] // 3, shape[1])
            factors = enumerate(((size[0], rank), (rank, size[1])))
            up, down = (base_tensor(f"{module.name} {n}", one, rms=1.0) for n, one in factors)
            scale = 0.3 / math.sqrt(size[1] * rank)
            tensors |= {f"{module.name}.lora_up.weight": up * scale, f"{module.name}.lora_down.weight": down}
            tensors[f"{module.name}.alpha"] = torch.tensor(float(rank))
    save_file({key: tensor.half().contiguous() for key, tensor in tensors.items()}, path)


def _xl_lora(path: Path, folder: Path) -> None:
    if not path.exists():
        base, tuned = small_pair(folder, "sdxl", overwrite=True)
        command = ["extract", "--base", base, "--tuned", tuned, "-o", path, "--rank", 1]
        assert main([str(word) for word in command]) == 0, "the LoRA of SDXL could not be made"
        shutil.rmtree(folder)


def _check_disk(folder: Path, needed: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if free < needed:
        raise SystemExit(f"{folder}: the checkpoints of the test need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


# ---- what A1111 wants beside the weights ----


def _vocabulary(python: Path) -> bytes:
    """The BPE merges that the WebUI's own packages bring."""
    code = "from importlib.util import find_spec as f; print(*(f(m).origin for m in ('open_clip', 'clip') if f(m)), sep='\\n')"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    files = [Path(line).parent / "bpe_simple_vocab_16e6.txt.gz" for line in found if line]
    return gzip.decompress(next(file for file in files if file.exists()).read_bytes())


def _tokenizer(folder: Path, vocabulary: bytes, *, width: int) -> None:
    """A folder from which transformers reads CLIP's tokenizer and the widths of its text encoder."""
    merges = vocabulary.decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(_letters().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), words[-1]) | {"bos_token": words[-2]}
    config = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    texts = {
        "vocab.json": json.dumps({word: n for n, word in enumerate(words)}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(config),
        "config.json": json.dumps(_clip_config(width)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _letters() -> dict[int, str]:
    """CLIP's and GPT-2's printable letter of each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _clip_config(width: int) -> dict[str, object]:
    text = {
        "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": 12, "num_attention_heads": width // 16 if width < 768 else 12, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "projection_dim": width,
    }  # fmt: skip
    return {
        "model_type": "clip",
        "projection_dim": width,
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model"},
    }


def _micro_config(webui: Path, tokenizer: Path) -> str:
    """The WebUI's own description of SD 1, with the widths of MICRO."""
    text = _changed(
        webui / "configs" / "v1-inference.yaml",
        {"model_channels: 320": f"model_channels: {MICRO.channels}", "num_heads: 8": "num_heads: 4",
         "context_dim: 768": f"context_dim: {MICRO.context}", "ch: 128": f"ch: {MICRO.vae}"},
    )  # fmt: skip
    target = "target: ldm.modules.encoders.modules.FrozenCLIPEmbedder"

    def with_tokenizer(found: re.Match[str]) -> str:
        return f"{found[1]}{target}\n{found[1]}params:\n{found[1]}  version: {tokenizer}"

    return re.sub(r"( *)" + re.escape(target), with_tokenizer, text)


def _micro_xl_config(webui: Path, tokenizer: Path) -> str:
    """The description of SDXL that the WebUI uses, with the widths of MICRO_XL; CLIP-G is that of the extension micro_clip."""
    label = MICRO_XL.text[-1] + 6 * MICRO_XL.size_embedding
    return _changed(
        webui / "repositories" / "generative-models" / "configs" / "inference" / "sd_xl_base.yaml",
        {"model_channels: 320": f"model_channels: {MICRO_XL.channels}", "ch: 128": f"ch: {MICRO_XL.vae}",
         "context_dim: 2048": f"context_dim: {MICRO_XL.context}", "adm_in_channels: 2816": f"adm_in_channels: {label}",
         "layer_idx: 11": f"layer_idx: 11\n              version: {tokenizer}", "arch: ViT-bigG-14": "arch: dpo-micro-clip"},
    )  # fmt: skip


def _changed(config: Path, changes: Mapping[str, str]) -> str:
    text = config.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is not once in the WebUI's {config.name}"
        text = text.replace(old, new)
    return text


def remove(folder: Path) -> None:
    """Delete a file or folder; links in it lead out of it and are not followed."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)
