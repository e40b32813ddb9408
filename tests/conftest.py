"""What all tests share: one thread, no network, no display and the same random examples every time on CI."""

from __future__ import annotations

import os

# before torch, matplotlib, huggingface_hub and gradio are imported, and inherited by the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: two threads that wait for each other are slower
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None)  # a shared machine is slow at times
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# What takes minutes comes first, so that no process is left alone with it at the end; the demo after what it waits for.
LONGEST = (
    "test_hosts",
    "test_bundled",
    "test_bench",
    "test_extract",
    "test_demo",
    "test_ui",
    "test_cli",
    "test_standalone",
    "test_processes",
    "test_hub",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a few steps of the bundled model's training make: its state in `work`, the files in `model`. No test changes it."""
    pytest.importorskip("diffusers")
    from filelock import FileLock

    from tools.bundled.recipe import SMOKE
    from tools.train_bundled_model import make

    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # of all the processes of a run, of which one makes it
    folder = run / "bundled"
    with FileLock(run / "bundled.lock"):
        if not (folder / "complete").is_file():
            make(SMOKE, folder / "work", folder / "model", bpe=None, say=lambda _: None)
            (folder / "complete").touch()
    return folder
