"""DPO offsets for Stable Diffusion: diff, extract as LoRA, bake, compare.

The functions below are the library's face (face.py), loaded when they are first asked for: a WebUI that starts asks for none.
Everything else lives in rooms, a folder each; docs/ARCHITECTURE.md shows them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_dpo.face import bake, compat, diff, extract, inspect, open_model, open_offset, resize, verify, write_offset

__version__ = "0.1.0"
__all__ = [
    "__version__", "bake", "compat", "diff", "extract", "inspect", "open_model", "open_offset", "resize", "verify",
    "write_offset",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lib_dpo import face

    return getattr(face, name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
