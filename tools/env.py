"""Environments for the tests and tools: one per pin set in requirements/, outside the tree, built once.

    python3 tools/env.py newest                    build where needed; the last line is the path of its Python
    python3 tools/env.py a1111 -m pytest -x        build where needed, then run its Python with these arguments

They live in ${XDG_CACHE_HOME:-~/.cache}/sd-webui-dpo/envs and are named by a hash of the pins and the Python version:
a changed pin makes a new one. Delete that folder to get the disk space back.

pip is called with your own configuration. On Linux PyPI's torch is a CUDA build of gigabytes: where there is no GPU, and
you have set no index of your own, PyTorch's index of CPU builds is asked as well, if it can be reached.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd-webui-dpo" / "envs"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
MARKER = "complete"  # written last: an environment without it is half-built
PYTHON_310_SETS = ("a1111", "forge")  # the hosts run on 3.10, and their torch has no wheels for much newer ones
# A Debian Python without python3-venv has no ensurepip, and a pyenv shim exists for versions that do not run.
PROBE = "import ensurepip, sys, venv; print('%d.%d.%d' % sys.version_info[:3]); print(sys.executable)"


def main(name: str, *args: str) -> None:
    """Build the environment `name` where needed, then print its Python or run it with `args`."""
    pins = REQUIREMENTS / f"{name}.txt"
    if not pins.is_file():
        known = ", ".join(sorted(file.stem for file in REQUIREMENTS.glob("*.txt")))
        sys.exit(f"error: no pin set {name!r} in requirements/; there are: {known}")
    version, base = find_python(name)
    env = place_of(pins, version)
    python = env / "bin" / "python"
    if not is_complete(env):
        build(env, base=base, pins=pins, title=f"{name} (Python {version})")
    if args:
        os.execv(python, [str(python), *args])
    print(python)


def built(name: str) -> Path | None:
    """The Python of an environment that was built before; None where it was not."""
    pins = REQUIREMENTS / f"{name}.txt"
    try:
        env = place_of(pins, find_python(name)[0])
    except SystemExit:
        return None
    return env / "bin" / "python" if is_complete(env) else None


def place_of(pins: Path, version: str) -> Path:
    """Where the environment of a pin set lies."""
    key = hashlib.sha256(pins.read_bytes() + version.encode()).hexdigest()[:12]
    return CACHE / f"{pins.stem}-{key}"


def find_python(name: str) -> tuple[str, str]:
    """The version and path of the first Python that suits the pin set and really runs."""
    old = name in PYTHON_310_SETS
    for candidate in candidates_310() if old else candidates_newest():
        found = probe(candidate)
        if found and (found[0].startswith("3.10.") if old else is_new_enough(found[0])):
            return found
    if old:
        sys.exit(
            f"error: no Python 3.10 with venv for the pin set {name!r}; looked at $PYTHON310, python3.10 on PATH, "
            "pyenv and uv. Install one (pyenv install 3.10, uv python install 3.10) or set PYTHON310 to its path."
        )
    sys.exit("error: no Python >= 3.10 with venv found; install one (on Debian with python3-venv) or set PYTHON.")


def candidates_newest() -> Iterator[str]:
    """3.11, which the newest pins were resolved on, else the Python that runs this file."""
    yield "python3.11"
    yield sys.executable


def candidates_310() -> Iterator[str]:
    """Where a Python 3.10 may be, the user's own choice first; later places are asked only if needed."""
    yield os.environ.get("PYTHON310", "")
    yield "python3.10"
    roots = [os.environ.get("PYENV_ROOT", ""), str(Path.home() / ".pyenv"), output("pyenv", "root")]
    for root in filter(None, roots):
        yield from map(str, sorted(Path(root).glob("versions/3.10*/bin/python"), reverse=True))
    yield output("uv", "python", "find", "3.10")


def probe(candidate: str) -> tuple[str, str] | None:
    """The version and real path of a Python, or None where it does not run or cannot make environments."""
    lines = output(candidate, "-c", PROBE).splitlines() if candidate else []
    return (lines[0], lines[1]) if len(lines) == 2 else None


def output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def is_new_enough(version: str) -> bool:
    """Whether this Python is 3.10 or later."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (3, 10)


def is_complete(env: Path) -> bool:
    """Whether the environment was built to the end and the Python it stands on is still there."""
    return (env / MARKER).is_file() and (env / "bin" / "python").exists()


def build(env: Path, *, base: str, pins: Path, title: str) -> None:
    """Build an environment in place (a venv cannot be moved); two builders of the same one wait for each other."""
    env.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{env}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(env):  # the other builder was quicker
            return
        say(f"building the environment {title}: the first time this downloads PyTorch and takes minutes")
        shutil.rmtree(env, ignore_errors=True)
        run(base, "-m", "venv", str(env))
        python = str(env / "bin" / "python")
        run(python, "-m", "pip", "install", "-qq", "--no-input", *index_of_cpu_builds(python), "-r", str(pins))
        (env / MARKER).touch()
        say(f"built {env}")


def index_of_cpu_builds(python: str) -> list[str]:
    """Arguments for pip that offer PyTorch's CPU builds; none where a GPU is, or you chose an index, or it is out of reach."""
    if not sys.platform.startswith("linux") or has_gpu() or has_own_index(python) or not is_reachable(f"{CPU_BUILDS}/torch/"):
        return []
    say(f"no GPU here: taking the CPU build of PyTorch from {CPU_BUILDS}")
    return ["--extra-index-url", CPU_BUILDS]


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether there are traces of an NVIDIA or AMD GPU or its driver."""
    return any(devices.glob("nvidia*")) or (devices / "kfd").exists() or shutil.which("nvidia-smi") is not None


def has_own_index(python: str) -> bool:
    """Whether pip's configuration, files and PIP_ variables alike, says where packages come from."""
    return (
        re.search(r"^\S*\.(index-url|extra-index-url|no-index)=", output(python, "-m", "pip", "config", "list"), re.M)
        is not None
    )


def is_reachable(url: str) -> bool:
    """Whether a page answers within seconds."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=4):
            return True
    except (OSError, ValueError):  # ValueError: a proxy's address that makes no sense
        return False


def run(*command: str) -> None:
    """Run a build step with its chatter on stderr; end here if it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)} failed with exit status {done.returncode}; see above")


def say(line: str) -> None:
    """Tell the person who waits; stdout is for the path alone."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"{__doc__}\nerror: name a pin set")
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
