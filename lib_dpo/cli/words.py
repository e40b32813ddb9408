"""What errors advise, in the words of the command line. The engine knows no flags, for tab and API show its errors too."""

from __future__ import annotations

from collections.abc import Mapping

FLAGS: Mapping[str, str] = {
    "allow it to be replaced": "allow it to be replaced (--overwrite)",
    "the precision fp32": "--precision fp32",
    "the profile webui or full": "--profile webui or full",
}


def with_flags(message: str) -> str:
    """An error's sentence with the flags that do what it advises."""
    for words, flag in FLAGS.items():
        message = message.replace(words, flag)
    return message
