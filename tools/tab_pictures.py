"""The pictures of the tab in README.md: the app over the bundled model, in the system's Chromium.

    python -m tools.tab_pictures [FOLDER]       a picture of each page, such as bake.png, and the walk through all of them as
                                                tour.gif (default: docs)

Needs the extra `test` (Playwright) and a Chromium: $CHROMIUM, or the first of the usual names on the PATH.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from lib_dpo.pictures.lettering import typeface
from lib_dpo.settings import BUNDLED_MODEL

Tour = list[Image.Image]

DOCS = Path(__file__).resolve().parent.parent / "docs"
PROMPTS = "two yellow crosses on the right\ntwo black crosses at the bottom"
WIDTH, SCALE = 1060, 1.5  # CSS pixels of the page, and pixels of the picture to each
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # gradio asks for fonts elsewhere
_PATIENCE_MS = 240_000
_COLOURS = 256  # of a picture's palette: a page has few, and its file a third of the size
_FRAME_WIDTH, _FRAME_HEIGHT, _FRAME_MS = 860, 640, 2600  # pixels of the film, CSS pixels of the page, time of each frame
_INK = "#1f2937"
_DRIFT = 0.03  # of the made-up finetune, as a share of each weight's size


def main(folder: str | None = None) -> None:
    """Draw all pages into a folder."""
    target = Path(folder) if folder else DOCS
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as models, _app(_models(Path(models))) as address, _page(address) as page:
        tour: Tour = []
        fills = {"Extract": _extract, "Compare": _compare, "Blind test": _blind, "Bake": _bake, "Inspect": _inspect}
        for label, fill in fills.items():
            name = label.split()[0].lower()
            page.locator("#dpo_pages").get_by_role("tab", name=label, exact=True).click()
            fill(page, tour)
            _shoot(page, target / f"{name}.png")
            print(target / f"{name}.png", flush=True)
        page.locator("#dpo_pages").get_by_role("tab", name="Bake", exact=True).click()
        _undo(page, tour)
    _save(tour, target / "tour.gif")


def _models(folder: Path) -> Path:
    """The bundled pair, and a finetune that drifted away from its base."""
    checkpoints = folder / "Stable-diffusion"
    checkpoints.mkdir()
    for name in ("toy-shapes.safetensors", "toy-shapes.yaml"):
        shutil.copyfile(BUNDLED_MODEL / name, checkpoints / name)
    shutil.copytree(BUNDLED_MODEL / "toy-shapes-dpo", folder / "DPO" / "toy-shapes-dpo")
    random = torch.Generator().manual_seed(0)
    tensors = load_file(checkpoints / "toy-shapes.safetensors")
    for key, tensor in tensors.items():
        if key.startswith("model.diffusion_model.") and tensor.dim() > 1:
            drift = torch.randn(tensor.shape, generator=random) * tensor.float().std() * _DRIFT
            tensors[key] = (tensor.float() + drift).to(tensor.dtype)
    save_file(tensors, checkpoints / "your-merge.safetensors")
    shutil.copyfile(checkpoints / "toy-shapes.yaml", checkpoints / "your-merge.yaml")
    return folder


@contextmanager
def _app(models: Path) -> Iterator[str]:
    """`dpo app` over a folder of models; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lib_dpo", "app", "--models", str(models), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as app:
        try:
            assert app.stdout is not None
            line = app.stdout.readline()
            if "serving" not in line:
                sys.exit(f"error: the app did not start: {line}")
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()


@contextmanager
def _page(address: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, _NAMES) if path), None)
    if not found:
        sys.exit(f"error: no browser; install one of {', '.join(_NAMES)}, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=_ARGUMENTS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE, color_scheme="light")
        page.set_default_timeout(_PATIENCE_MS)
        page.goto(address)
        page.wait_for_function("() => document.querySelector('#dpo_status')?.innerText.includes('toy-shapes')")
        yield page
        browser.close()


# ---- what is done on each page ----


def _extract(page: Any, tour: Tour) -> None:
    _press(page, "dpo_extract_dense", "dpo_extract_result", "-offset is written")  # for Compare and Bake
    _press(page, "dpo_extract_go", "dpo_extract_result", "-lora is written")
    _fill(page, "dpo_extract_rank", "16")
    _press(page, "dpo_extract_analyse", "dpo_extract_pair_result", "Is it the right base?")
    page.locator("#dpo_extract_outlook").filter(has_text="Rank 16").wait_for()
    tour.append(_frame(page, "1  Analyse: what a LoRA of each size keeps", at="dpo_extract_analyse"))
    tour.append(_frame(page, "2  Extract the LoRA", at="dpo_extract_result"))


def _compare(page: Any, tour: Tour) -> None:
    _choose(page, "dpo_compare_offset", "toy-shapes-dpo-offset")
    _fill(page, "dpo_compare_prompts", PROMPTS)
    _fill(page, "dpo_compare_strengths", "1, 1.5, 2")
    page.locator("#dpo_compare_more .label-wrap").first.click()
    _fill(page, "dpo_compare_seeds", "1")
    _choose(page, "dpo_compare_sampler", "DDIM")
    _fill(page, "dpo_compare_cfg", "3")
    _press(page, "dpo_compare_go", "dpo_compare_result", "effect")
    page.wait_for_timeout(3000)
    tour.append(_frame(page, "3  Compare: your prompts, without and with it", at="dpo_compare_cells"))


def _blind(page: Any, tour: Tour) -> None:
    _choose(page, "dpo_blind_offset", "toy-shapes-dpo-offset")
    _fill(page, "dpo_blind_prompts", PROMPTS)
    _fill(page, "dpo_blind_strengths", "1, 2, 3")
    _press(page, "dpo_blind_go", "dpo_blind_figures", "No votes yet")
    for number, choice in enumerate(("left", "right", "none", "left", "right", "right")):
        page.locator("#dpo_blind_view .dpo-blind").wait_for()
        page.wait_for_timeout(500)
        if not number:
            page.wait_for_timeout(2000)
            tour.append(_frame(page, "4  Vote blindly: which of the two is better?", at="dpo_blind_view"))
        page.locator(f"#dpo_blind_{choice}").click()
        page.locator("#dpo_blind_view .dpo-waiting, #dpo_blind_view .dpo-blind").first.wait_for()
    page.locator("#dpo_blind_view .dpo-blind").wait_for()
    page.wait_for_timeout(2000)
    tour.append(_frame(page, "5  Your votes find your strength", at="dpo_blind_figures"))


def _bake(page: Any, tour: Tour) -> None:
    _choose(page, "dpo_bake_offset", "toy-shapes-dpo-offset")
    _press(page, "dpo_bake_go", "dpo_bake_result", "Baked into the loaded model")
    page.wait_for_timeout(3000)
    tour.append(_frame(page, "6  Bake it into the loaded model", at="dpo_status"))


def _undo(page: Any, tour: Tour) -> None:
    _press(page, "dpo_bake_undo", "dpo_bake_result", "bit for bit")
    page.wait_for_timeout(3000)
    tour.append(_frame(page, "7  Undo brings every bit back", at="dpo_status"))


def _inspect(page: Any, tour: Tour) -> None:
    _choose(page, "dpo_inspect_target", "your-merge.safetensors")
    _choose(page, "dpo_inspect_base", "toy-shapes.safetensors")
    _press(page, "dpo_inspect_fit", "dpo_inspect_result", "Strength to start with")


def _press(page: Any, button: str, place: str, words: str) -> None:
    page.locator(f"#{button}").first.click()
    page.locator(f"#{place}").first.filter(has_text=words).wait_for()


def _fill(page: Any, elem_id: str, value: str) -> None:
    field = page.locator(f"#{elem_id}").locator("textarea, input[type=number], input[type=text], input:not([type])").first
    field.fill(value)
    field.press("Tab")


def _choose(page: Any, elem_id: str, value: str) -> None:
    """From a list, by the beginning of a name. The tab fills its lists a moment after it was shown."""
    field = page.locator(f"#{elem_id} input").first
    option = page.get_by_role("option").filter(has_text=value).first
    for _ in range(_PATIENCE_MS // 3000):
        field.click()
        page.wait_for_timeout(1500)
        if option.count():
            option.click()
            return
        field.press("Escape")
        field.blur()
        page.wait_for_timeout(1500)
    sys.exit(f"error: {elem_id} does not offer {value}")


def _shoot(page: Any, file: Path) -> None:
    """The tab from its status line to its foot, in a palette of few colours."""
    page.mouse.move(0, 0)
    page.evaluate("() => { document.activeElement?.blur(); window.scrollTo(0, 0); }")
    time.sleep(2)  # pictures fade in
    top, foot = (page.locator(f"#{name}").first.bounding_box() for name in ("dpo_status", "dpo_foot"))
    area = {"x": 0, "y": max(top["y"] - 12, 0), "width": WIDTH, "height": foot["y"] - top["y"] + 4}
    page.screenshot(path=str(file), full_page=True, clip=area)
    with Image.open(file) as picture:
        few = picture.convert("RGB").quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file, optimize=True)


def _frame(page: Any, words: str, *, at: str) -> Image.Image:
    """A piece of the page from an element down, under a line of words."""
    page.mouse.move(0, 0)
    page.evaluate("() => { document.activeElement?.blur(); window.scrollTo(0, 0); }")
    page.wait_for_timeout(1500)
    top = page.locator(f"#{at}").first.bounding_box()["y"]
    bottom = page.evaluate("() => document.documentElement.scrollHeight")
    clip = {"x": 0, "y": max(0, min(top - 12, bottom - _FRAME_HEIGHT)), "width": WIDTH, "height": _FRAME_HEIGHT}
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")
    size = (_FRAME_WIDTH, round(_FRAME_WIDTH * _FRAME_HEIGHT / WIDTH))
    face = typeface(20, bold=True)
    frame = Image.new("RGB", (size[0], size[1] + 44), _INK)
    frame.paste(shot.resize(size, Image.Resampling.LANCZOS), (0, 44))
    ImageDraw.Draw(frame).text((16, 10), words, "white", font=face.font)
    return frame


def _save(tour: Tour, file: Path) -> None:
    few = [frame.quantize(_COLOURS // 2, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for frame in tour]
    few[0].save(file, save_all=True, append_images=few[1:], duration=_FRAME_MS, loop=0, optimize=True)
    print(file, f"{file.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
