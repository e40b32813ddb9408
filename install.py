"""Run by the WebUI when it starts. It installs nothing: it says in one line what does not fit, if anything."""

import importlib.metadata
import re
import sys

PYTHON = (3, 10)
LEAST = {"torch": (2, 1), "safetensors": (0, 4, 2), "numpy": (1, 24), "gradio": (3, 41), "fastapi": (0, 90)}


def numbers(version):
    """The leading numbers of a version: 2.1.2+cu121 -> (2, 1, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def problems(python=sys.version_info, version_of=importlib.metadata.version):
    """What does not fit, each in a few words."""
    found = []
    if tuple(python[:2]) < PYTHON:
        found.append(f"Python {python[0]}.{python[1]} is older than {'.'.join(map(str, PYTHON))}")
    for name, least in LEAST.items():
        try:
            version = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed")
            continue
        if numbers(version) < least:
            found.append(f"{name} {version} is older than {'.'.join(map(str, least))}")
    return found


if __name__ == "__main__":
    wrong = problems()
    if wrong:
        print(f"DPO offset: {'; '.join(wrong)}. It may not work here; update the WebUI.")
