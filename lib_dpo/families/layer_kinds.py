"""Kinds of layer: attention, feed-forward, convolution and so on, by the canonical key of a tensor."""

from __future__ import annotations

import re

# By a part of the key; the first match counts. A norm is named first: its names hold those of the layers around it.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"(?:norm\d?|ln_\w+|in_layers\.0|out_layers\.0|\bout\.0)\.(?:weight|bias)$", "norm"),
    (r"\.attn1\.|self_attn|\.attn\.", "self-attention"),
    (r"\.attn2\.", "cross-attention"),
    (r"\.ff\.|\.mlp\.", "feed-forward"),
    (r"\.in_layers\.2\.|\.out_layers\.3\.|\.conv\.|\.op\.|input_blocks\.0\.0\.|\bout\.2\.|\.skip_connection\.", "convolution"),
    (r"\.proj_in\.|\.proj_out\.|text_projection", "projection"),
    (r"emb_layers|time_embed|label_emb|embedding", "embedding"),
)
_TESTS = tuple((re.compile(mark), kind) for mark, kind in _KINDS)

# Each with its name in block weights.
KINDS = {
    "self-attention": "ATTN1", "cross-attention": "ATTN2", "feed-forward": "FF", "projection": "PROJ", "convolution": "CONV",
    "embedding": "EMB", "norm": "NORM",
}  # fmt: skip


def kind_of(key: str) -> str:
    """The kind of layer that a canonical key of a UNet or a text encoder belongs to: one of KINDS."""
    return next((kind for test, kind in _TESTS if test.search(key)), "norm")
