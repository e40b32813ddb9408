"""What `pip install` gives: a command `dpo` that works in any folder, with the files it needs beside its code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib_dpo import __version__
from lib_dpo.errors import missing_extra

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def site(project: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pyproject.toml puts into a wheel, laid out as pip does, and the script of its entry point."""
    folder = tmp_path_factory.mktemp("site packages")
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in {**{name: name for name in wheel["packages"]}, **wheel["force-include"]}.items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, folder / target)
    module, function = project["project"]["scripts"]["dpo"].split(":")
    (folder / "dpo").write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n", encoding="utf-8")
    return folder


def dpo(site: Path, folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, site / "dpo", *map(str, args)],
        cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip


def test_the_command_works_from_any_folder(site: Path, tmp_path: Path):
    done = dpo(site, tmp_path, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dpo {__version__}\n", "")
    done = dpo(site, tmp_path, "diff")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "see `dpo diff --help`" in done.stderr


def test_python_m_names_itself(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "lib_dpo", "diff"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "see `python -m lib_dpo diff --help`" in done.stderr


def test_the_bundled_model_and_the_looks_of_the_tab_come_along(site: Path, tmp_path: Path):
    program = (
        "from lib_dpo.settings import ASSETS, BUNDLED_MODEL; from lib_dpo.toy.bundled import check_there; "
        "from lib_dpo.webui.app import own_models; from pathlib import Path; import lib_dpo; "
        "assert Path(lib_dpo.__file__).parent == ASSETS.parent, ASSETS; check_there(BUNDLED_MODEL); "
        "assert (ASSETS / 'style.css').is_file() and (ASSETS / 'javascript' / 'dpo.js').is_file(); "
        "print(sorted(path.name for path in own_models().rglob('*') if path.is_file()))"
    )
    env = {**os.environ, "PYTHONPATH": str(site), "XDG_DATA_HOME": str(tmp_path / "data")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "toy-shapes.safetensors" in done.stdout
    assert "diffusion_pytorch_model.safetensors" in done.stdout
    model = site / "lib_dpo" / "assets" / "models" / "bundled" / "toy-shapes.safetensors"
    done = dpo(site, tmp_path, "inspect", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SD 1.x" in done.stdout


def test_a_missing_library_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python")
    told = str(missing_extra("pictures need", "diffusers", "transformers", instead="leave them out"))
    assert told == (
        "pictures need diffusers and transformers, which this Python lacks; install with: "
        '"/opt/my python/bin/python" -m pip install diffusers transformers, or leave them out'
    )
