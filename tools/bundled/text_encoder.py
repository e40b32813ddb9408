"""The text encoder: a small CLIP text model that is taught to tell what a caption names; and its tokenizer's files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib_dpo.toy.pictures import PROPERTIES, VALUES, Scene, caption
from tools.bundled.autoencoder import initialise
from tools.bundled.captions import all_captions
from tools.bundled.recipe import TEXT_LAYERS, TOKENS, VOCABULARY, Recipe
from tools.bundled.training import device_of, train

_SHORT = 16  # tokens, enough for any caption: a causal encoder sees nothing of what follows


def config(recipe: Recipe, layers: int = TEXT_LAYERS) -> dict[str, Any]:
    """Of transformers' CLIPTextModel."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": recipe.text_width,
        "intermediate_size": 4 * recipe.text_width,
        "projection_dim": recipe.text_width,
        "num_hidden_layers": layers,
        "num_attention_heads": recipe.text_heads,
        "max_position_embeddings": TOKENS,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 1,
    }


def build(recipe: Recipe) -> Any:
    """An untrained CLIPTextModel of transformers with only the layers that are trained."""
    from transformers import CLIPTextConfig, CLIPTextModel

    network = CLIPTextModel(CLIPTextConfig(**config(recipe, recipe.text_layers)))
    generator = torch.Generator().manual_seed(recipe.seed)
    initialise(network, generator)
    for name, parameter in network.named_parameters():
        if "token_embedding" in name:
            parameter.data.normal_(0.0, 0.5, generator=generator)
        elif "position_embedding" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
        elif name.endswith("final_layer_norm.bias"):
            parameter.data.normal_(0.1, 0.1, generator=generator)  # A1111 divides by the mean of what comes out
    return network


def fit(recipe: Recipe, tokenizer: Any, folder: Path, say: Callable[[str], None], device: torch.device) -> Any:
    """Train it, with a linear reader of every property on its last token, on all captions."""
    network = build(recipe)
    said = all_captions()
    ids = tokens(tokenizer, said)
    last = ids[:, :_SHORT].argmax(dim=1)  # the end token is the largest number; padding repeats it
    targets = torch.tensor([[(*VALUES[name], None).index(getattr(scene, name)) for name in PROPERTIES] for scene in said])
    readers = nn.ModuleList(nn.Linear(recipe.text_width, len(VALUES[name]) + 1) for name in PROPERTIES)
    initialise(readers, torch.Generator().manual_seed(recipe.seed))
    both = nn.ModuleDict({"encoder": network, "readers": readers}).to(device)

    def loss(_: int, rng: np.random.Generator, __: torch.Generator) -> Tensor:
        chosen = torch.from_numpy(rng.integers(len(said), size=recipe.text_encoder.batch))
        hidden = network(input_ids=ids[chosen, :_SHORT].to(device)).last_hidden_state
        end = hidden[torch.arange(len(chosen)), last[chosen]]
        errors = [nn.functional.cross_entropy(read(end), targets[chosen, n].to(device)) for n, read in enumerate(readers)]
        return torch.stack(errors).sum()

    train("text_encoder", both, recipe.text_encoder, loss, seed=recipe.seed, folder=folder, average=0.99, say=say)
    _forget_unused(network, ids)
    return network


@torch.no_grad()
def _forget_unused(network: Any, ids: Tensor) -> None:
    """Words that no caption holds get the embedding 0: they say nothing, and the file packs better."""
    unused = torch.ones(VOCABULARY, dtype=torch.bool)
    unused[torch.unique(ids)] = False
    network.get_input_embeddings().weight[unused] = 0.0


def tokens(tokenizer: Any, scenes: Sequence[Scene | None]) -> Tensor:
    """Captions as (n, 77) token numbers; None is the empty caption."""
    texts = [caption(scene) if scene else "" for scene in scenes]
    found: Tensor = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    return found


@torch.no_grad()
def embed(network: Any, tokenizer: Any, scenes: Sequence[Scene | None]) -> Tensor:
    """Captions as the denoiser takes them, (n, 77, width)."""
    ids = tokens(tokenizer, scenes).to(device_of(network))
    parts = [network(input_ids=part).last_hidden_state for part in torch.split(ids, 64)]
    return torch.cat(parts)


def write_tokenizer(bpe: Path, folder: Path, recipe: Recipe) -> None:
    """CLIP's tokenizer as transformers reads it, from the file of merges that the `clip` packages ship.

    The vocabulary follows from the merges: github.com/openai/CLIP, clip/simple_tokenizer.py.
    """
    lines = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : VOCABULARY - 256 * 2 - 2 + 1]
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == VOCABULARY, f"{bpe} is not CLIP's file of merges"
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": words[-2], "eos_token": words[-1], "pad_token": words[-1], "unk_token": words[-1]}
    options = {"model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"}
    _write(folder / "vocab.json", json.dumps({word: n for n, word in enumerate(words)}, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    _write(folder / "tokenizer_config.json", json.dumps(special | options, indent=2) + "\n")
    _write(folder / "config.json", json.dumps(config(recipe), indent=2) + "\n")


def copy_tokenizer(source: Path, folder: Path, recipe: Recipe) -> None:
    """The same from files that `write_tokenizer` made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        _write(folder / name, (source / name).read_text(encoding="utf-8"))
    _write(folder / "config.json", json.dumps(config(recipe), indent=2) + "\n")


def _letters() -> list[str]:
    """The 256 characters that stand for bytes: printable ones for themselves, the others from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + n) for n in range(256 - len(own))]
    return [chr(n) for n in own] + others


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
