"""The metadata of LoRA files that we write: what WebUIs read to show and to filter them, and what goes when bytes change."""

from __future__ import annotations

import json

from lib_dpo import __version__
from lib_dpo.families.arch import Architecture

# What a file costs beside its numbers: each header entry (70 to 95 bytes without the name), and our own metadata.
ENTRY_BYTES, METADATA_BYTES = 96, 1 << 13
# Metadata entries that describe the bytes of the file they were copied from.
STALE_METADATA = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


def kohya_metadata(
    arch: Architecture, *, dim: tuple[str, str], alpha: tuple[str, str], title: str, is_lokr: bool = False
) -> dict[str, str]:
    """The entries that WebUIs read to show and to filter a LoRA: kohya's `ss_*` and Stability's `modelspec.*`.

    Args:
        dim, alpha: of linear layers, and of 3x3 convolutions.
        is_lokr: it is a LoKr of LyCORIS, with whole matrices.
    """
    arguments = {"algo": "lokr", "full_matrix": "True"} if is_lokr else {"conv_dim": dim[1], "conv_alpha": alpha[1]}
    return {
        "ss_base_model_version": arch.ss_base_model_version,
        "ss_v2": str(arch.name.startswith("sd2")),
        "ss_network_module": "lycoris.kohya" if is_lokr else "networks.lora",
        "ss_network_dim": dim[0],
        "ss_network_alpha": alpha[0],
        "ss_network_args": json.dumps(arguments),
        **modelspec_metadata(arch, "lora", title),
        "dpo.version": __version__,
    }


def modelspec_metadata(arch: Architecture, kind: str, title: str) -> dict[str, str]:
    """Stability's `modelspec.*` entries of something that is added to a model of an architecture, such as a `lora`."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{arch.modelspec}/{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
    }
