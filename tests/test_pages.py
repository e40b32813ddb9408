"""The tab in a real browser, on the gradio of each kind of WebUI, used as a person would use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_browser import CHROMIUM, ROOT

from tools import env

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium"),
    pytest.mark.skipif(os.name == "nt", reason="environments of the hosts' versions are built on Linux and macOS"),
]
SERVER = Path(__file__).with_name("serve_tab.py")
PAGES = {"extract": "Extract", "bake": "Bake", "compare": "Compare", "blind": "Blind test", "inspect": "Inspect"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, another model, and a LoRA of the pair."""
    folder = tmp_path_factory.mktemp("pages")
    base = tiny.save(folder / "Stable-diffusion" / "base.safetensors", tiny.base(), torch.float16)
    tiny.save(folder / "Stable-diffusion" / "other.safetensors", tiny.base(seed=5), torch.float16)
    tuned = tiny.in_diffusers("sd1", tiny.only_unet(tiny.tuned(rms=1e-3)))
    reference = tiny.save(folder / "DPO" / "dpo-sd1" / "unet" / "diffusion_pytorch_model.safetensors", tuned)
    lora = folder / "Lora" / "dpo-mine.safetensors"
    assert tiny.run("extract", "--base", base, "--tuned", reference, "-o", lora, "--rank", 4) == 0
    for file in folder.rglob("*.safetensors"):
        os.utime(file, (1e9, 1e9))  # hashes of files of the last two seconds are not remembered
    return folder


GRADIOS = ["newest", "forge", "a1111"] if os.environ.get("DPO_ALL_GRADIOS") else ["newest"]  # .ci/run sets it


@pytest.fixture(scope="module", params=GRADIOS)
def address(request: pytest.FixtureRequest, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the tab on the newest gradio, and on those of Forge (4.40) and AUTOMATIC1111 (3.41) where these are built."""
    python = Path(sys.executable) if request.param == "newest" else env.built(request.param)
    if python is None:
        pytest.skip(f"the environment {request.param} is not built; see tools/env.py")
    models = tmp_path_factory.mktemp(request.param) / "models"
    shutil.copytree(files, models)
    with _serving(python, models) as found:
        yield found


@contextmanager
def _serving(python: Path, models: Path) -> Iterator[str]:
    variables = {"GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
    command = [str(python), str(SERVER), str(models)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables) as server:
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            line = next((line for line in lines if line.startswith("serving")), "")
            assert line, "the server did not start"
            yield line.split()[1]
        finally:
            server.kill()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Open the tab, with a width and dark or light."""
    contexts = []

    def open_tab(width: int = 1280, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{address}?__theme={scheme}")
        page.wait_for_selector("#dpo_tab")
        page.add_style_tag(path=str(ROOT / "style.css"))
        page.add_script_tag(path=str(ROOT / "javascript" / "dpo.js"))
        page.wait_for_function("() => document.querySelector('#dpo_status').innerText.includes('base')")
        said(page, "dpo_extract_first", "Chosen: dpo-sd1")  # the lists are filled, and nothing moves any more
        return page

    yield open_tab
    for context in contexts:
        context.close()


def to(page: Any, name: str) -> None:
    pages = page.locator("#dpo_pages")
    own = pages.get_by_role("tab", name=PAGES[name], exact=True)
    button = own.or_(pages.locator(".tab-nav").get_by_role("button", name=PAGES[name], exact=True)).first
    if not button.count():  # gradio 6 puts what has no room behind a button
        assert pages.get_by_role("button", name="More tabs").is_visible()
        pages.locator(".overflow-dropdown button").filter(has_text=PAGES[name]).dispatch_event(
            "click"
        )  # its menu closes by itself
    else:
        button.click()
    page.locator(f"#dpo_{name}").wait_for()


def choose(page: Any, elem_id: str, value: str) -> None:
    """From a list; the tab fills its lists a moment after it was shown."""
    field = page.locator(f"#{elem_id} input").first
    for _ in range(20):
        if field.input_value() == value or field.input_value().startswith(f"{value} · "):  # some say what a file is
            return
        field.click()
        field.fill(value[:-1])
        page.wait_for_timeout(400)
        option = (
            page.get_by_role("option").filter(has_text=value).or_(page.locator("ul.options li").filter(has_text=value)).first
        )
        if option.count():
            option.click()
        else:
            field.press("Escape")
        page.wait_for_timeout(400)
    raise AssertionError(f"{elem_id} does not offer {value}")


def fill(page: Any, elem_id: str, value: str) -> None:
    field = page.locator(f"#{elem_id}").locator("textarea, input[type=number], input[type=text], input:not([type])").first
    field.fill(value)
    field.press("Tab")


def said(page: Any, elem_id: str, words: str) -> None:
    """Wait until a place says these words. Gradio 3.41 gives the id of an HTML to two elements."""
    try:
        page.locator(f"#{elem_id}").first.filter(has_text=words).wait_for()
    except sync_api.TimeoutError:
        raise AssertionError(f"{elem_id} does not say '{words}':\n{page.locator('#dpo_tab').inner_text()}") from None


def press(page: Any, elem_id: str, place: str, words: str) -> None:
    page.locator(f"#{elem_id}").first.click()
    said(page, place, words)


def ready_to_bake(page: Any) -> None:
    to(page, "bake")
    choose(page, "dpo_bake_offset", "dpo-mine")
    said(page, "dpo_bake_before", "it can be baked")


def test_a_lora_is_extracted_and_leads_on(opened: Callable[..., Any]):
    page = opened()
    choose(page, "dpo_extract_reference", "dpo-sd1")
    press(page, "dpo_extract_analyse", "dpo_extract_pair_result", "Is it the right base?")
    page.locator("#dpo_extract_outlook .dpo-chart").wait_for()
    fill(page, "dpo_extract_rank", "2")
    said(page, "dpo_extract_outlook", "Rank 2 →")
    fill(page, "dpo_extract_name", "new-one")
    press(page, "dpo_extract_go", "dpo_extract_result", "new-one is written")
    assert "Is it the right base?" in page.locator("#dpo_extract_pair_result").first.inner_text()
    page.locator("#dpo_extract_result .dpo-doors").get_by_role("button", name="Bake").click()
    page.locator("#dpo_bake_go").wait_for()
    said(page, "dpo_bake_before", "new-one is a LoRA")


def test_the_answer_comes_to_the_page_that_is_opened_after_it_was_closed(opened: Callable[..., Any]):
    page = opened()
    to(page, "compare")
    fill(page, "dpo_compare_strengths", "0.5, 1, 1.5, 2, 3")
    page.locator("#dpo_compare_go").click()
    said(page, "dpo_compare_cells", "seed")  # the first pictures are there
    page.context.close()
    again = opened()
    said(again, "dpo_status", "Compare:")
    to(again, "compare")
    again.wait_for_function("() => !document.querySelector('#dpo_status').innerText.includes('Compare:')")
    _look_until(again, "dpo_compare_result", "effect")
    assert again.locator("#dpo_compare_cells .dpo-cell").count() == 36
    assert again.locator("#dpo_compare_wipe img").count() >= 2


def _look_until(page: Any, elem_id: str, words: str) -> None:
    """Press what the page presses every few seconds in a WebUI, until a place says these words."""
    for _ in range(30):
        page.locator("#dpo_tick").dispatch_event("click")
        page.wait_for_timeout(1000)
        if words in page.locator(f"#{elem_id}").first.inner_text():
            return
    raise AssertionError(f"{elem_id} does not say '{words}'")


def test_an_answer_that_its_page_has_goes_to_no_other(opened: Callable[..., Any]):
    page = opened()
    to(page, "inspect")
    press(page, "dpo_inspect_look", "dpo_inspect_result", "SD 1.x")
    page.wait_for_timeout(1000)
    other = opened()
    to(other, "inspect")
    for _ in range(14):  # longer than an answer waits for its own page
        other.locator("#dpo_tick").dispatch_event("click")
        other.wait_for_timeout(1000)
    assert "Choose a file to see what it is" in other.locator("#dpo_inspect_result").first.inner_text()


def test_bake_and_undo(opened: Callable[..., Any]):
    page = opened()
    ready_to_bake(page)
    assert page.locator("#dpo_bake_undo").is_disabled()
    page.locator("#dpo_bake_groups").get_by_text("Each part by itself").click()
    fill(page, "dpo_bake_group_mid", "0.5")
    page.wait_for_function(
        "() => document.querySelector('#dpo_bake_blocks textarea, #dpo_bake_blocks input').value === 'MID=0.5'"
    )
    press(page, "dpo_bake_go", "dpo_bake_result", "MID=0.5")
    page.wait_for_function("() => !document.querySelector('#dpo_bake_undo').disabled")
    said(page, "dpo_status", "baked: dpo-mine × 1 (MID=0.5)")
    press(page, "dpo_bake_undo", "dpo_bake_result", "bit for bit")
    page.wait_for_function("() => document.querySelector('#dpo_bake_undo').disabled")


def test_compare_shows_cells_that_can_be_enlarged(opened: Callable[..., Any]):
    page = opened()
    to(page, "compare")
    choose(page, "dpo_compare_offset", "dpo-mine")
    fill(page, "dpo_compare_prompts", "a cat")
    fill(page, "dpo_compare_strengths", "0.5, 1")
    said(page, "dpo_compare_forecast", "pictures")
    press(page, "dpo_compare_go", "dpo_compare_result", "effect")
    assert page.locator("#dpo_compare_cells .dpo-cell").count() == 6  # two seeds, untouched and two strengths
    page.locator("#dpo_compare_cells .dpo-cell").nth(1).click()
    page.locator("dialog.dpo-large").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_function("() => !document.querySelector('dialog.dpo-large')")


def test_votes_by_keyboard_are_counted(opened: Callable[..., Any]):
    page = opened()
    to(page, "blind")
    choose(page, "dpo_blind_offset", "dpo-mine")
    fill(page, "dpo_blind_prompts", "a cat\na dog")
    press(page, "dpo_blind_go", "dpo_blind_figures", "No votes yet")
    page.locator("#dpo_blind_view .dpo-blind img").first.wait_for()
    page.locator("body").press("ArrowLeft")
    page.wait_for_function("() => !document.querySelector('#dpo_blind_figures').innerText.includes('No votes yet')")
    page.locator("#dpo_blind_view .dpo-blind img").first.wait_for()


def test_inspect_answers_both_questions(opened: Callable[..., Any]):
    page = opened()
    to(page, "inspect")
    press(page, "dpo_inspect_look", "dpo_inspect_result", "SD 1.x")
    choose(page, "dpo_inspect_target", "other.safetensors")
    choose(page, "dpo_inspect_base", "base.safetensors")
    choose(page, "dpo_inspect_reference", "dpo-sd1")
    page.locator("#dpo_inspect_fit").click()
    said(page, "dpo_inspect", "Strength to start with")


def test_a_bake_by_keyboard_alone(opened: Callable[..., Any]):
    """From the page's own top, with Tab, arrows and Enter; the focus is always to be seen."""
    page = opened()
    ready_to_bake(page)
    page.locator("#dpo_bake_offset input").first.focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate("""() => {
            const at = document.activeElement, look = getComputedStyle(at), box = getComputedStyle(at.parentElement);
            const seen = (each) => each.outlineStyle !== "none" || each.boxShadow !== "none";
            const own = at.closest("[id^=dpo_]");
            return [own ? own.id : "", seen(look) || seen(box) || look.borderColor !== "rgb(0, 0, 0)"];
        }""")
        assert focused[1], focused
        if focused[0] == "dpo_bake_go":
            break
    assert focused[0] == "dpo_bake_go"
    page.keyboard.press("Enter")
    said(page, "dpo_bake_result", "Baked into the loaded model")


def test_the_doors_of_a_card_open_on_a_narrow_page_too(opened: Callable[..., Any]):
    page = opened(width=420)
    for name in ("inspect", "bake", "blind", "extract", "compare"):
        page.evaluate("(id) => dpoOpen(id, 'dpo_foot')", f"dpo_{name}")
        page.locator(f"#dpo_{name}").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_or_wider_than_a_narrow_page(opened: Callable[..., Any], scheme: str):
    page = opened(width=420, scheme=scheme)
    for name in PAGES:
        to(page, name)
        page.wait_for_timeout(400)
        wide = page.evaluate("""() => [...document.querySelectorAll("#dpo_tab *")].filter((each) => {
            if (!each.offsetParent || each.closest(".dpo-scroll, dialog, svg")) return false;
            const box = each.getBoundingClientRect();
            return box.width > 1 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
        }).map((each) => each.closest("[id]").id + " " + each.className)""")
        assert not wide, name
        cut = page.evaluate("""() => [
            ...document.querySelectorAll("#dpo_tab button:not(.label-wrap), #dpo_tab label > span")
        ].filter((each) =>
            each.offsetParent && each.scrollWidth > each.clientWidth + 2 && getComputedStyle(each).display !== "inline"
        ).map((each) => each.innerText)""")
        assert not cut, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened: Callable[..., Any], scheme: str):
    """Names for screen readers, contrast of 4.5, roles: by axe-core, on every page with its answers on it."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    page = opened(scheme=scheme)
    choose(page, "dpo_extract_reference", "dpo-sd1")
    press(page, "dpo_extract_analyse", "dpo_extract_pair_result", "Is it the right base?")
    found = _serious(axe, page, "extract")
    ready_to_bake(page)
    page.locator("#dpo_bake_groups").get_by_text("Each part by itself").click()
    press(page, "dpo_bake_go", "dpo_bake_result", "Baked into the loaded model")
    found += _serious(axe, page, "bake")
    press(page, "dpo_bake_undo", "dpo_bake_result", "bit for bit")
    to(page, "compare")
    choose(page, "dpo_compare_offset", "dpo-mine")
    fill(page, "dpo_compare_prompts", "a cat")
    fill(page, "dpo_compare_strengths", "1")
    press(page, "dpo_compare_go", "dpo_compare_result", "effect")
    found += _serious(axe, page, "compare")
    page.locator("#dpo_compare_cells .dpo-cell").nth(1).click()
    page.locator("dialog.dpo-large").wait_for()
    found += _serious(axe, page, "large picture")
    page.keyboard.press("Escape")
    to(page, "blind")
    choose(page, "dpo_blind_offset", "dpo-mine")
    page.locator("#dpo_blind_go").click()
    page.locator("#dpo_blind_view .dpo-blind img").first.wait_for()
    found += _serious(axe, page, "blind")
    to(page, "inspect")
    press(page, "dpo_inspect_look", "dpo_inspect_result", "SD 1.x")
    found += _serious(axe, page, "inspect")
    assert not found


def _serious(axe: Any, page: Any, name: str) -> list[str]:
    page.wait_for_timeout(1500)  # what was pale while it waited has its colour
    response = axe.run(page, context="#dpo_tab").response
    return [
        f"{name}: {each['id']}: {node['html'][:120]}"
        for each in response["violations"] if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]  # fmt: skip


# ---- the six questions of people who find such files, each within three clicks from the first view ----


def clicked(page: Any, *elem_ids: str) -> None:
    """Click as a person does: a page by its title, a button or a field by its id; three times since it was opened at most."""
    page.clicks = getattr(page, "clicks", 0) + len(elem_ids)
    assert page.clicks <= 3
    for elem_id in elem_ids:
        if elem_id in PAGES:
            to(page, elem_id)
        else:
            page.locator(f"#{elem_id}").first.click()


def test_what_does_it_do(opened: Callable[..., Any]):
    page = opened()
    assert "what preference tuning (DPO) changed in a model" in page.locator("#dpo_extract_first").first.inner_text()
    clicked(page, "compare", "dpo_compare_go")  # and pictures of before and after
    said(page, "dpo_compare_result", "effect")
    assert page.locator("#dpo_compare_cells .dpo-cell").count() == 24  # three ready-made prompts, two seeds, four columns
    assert page.locator("#dpo_compare_wipe img").count() >= 2


def test_which_strength_is_best(opened: Callable[..., Any]):
    page = opened()
    clicked(page, "dpo_extract_analyse")  # to start with
    said(page, "dpo_extract_pair_result", "Which strength to start with?")
    page = opened()
    clicked(page, "blind", "dpo_blind_strengths")  # by votes
    fill(page, "dpo_blind_strengths", "0.5, 1, 1.5")
    clicked(page, "dpo_blind_go")
    page.locator("#dpo_blind_view .dpo-blind img").first.wait_for()
    page.locator("body").press("ArrowLeft")
    page.wait_for_function("() => !document.querySelector('#dpo_blind_figures').innerText.includes('No votes yet')")
    said(page, "dpo_blind_figures", "strength")


def test_lora_or_bake(opened: Callable[..., Any]):
    page = opened()
    clicked(page, "dpo_extract_analyse")
    said(page, "dpo_extract_pair_result", "LoRA or bake?")


def test_does_it_work_with_my_model(opened: Callable[..., Any]):
    page = opened()
    clicked(page, "inspect", "dpo_inspect_fit")
    said(page, "dpo_inspect_result", "Does it fit your model?")
    said(page, "dpo_inspect_result", "found among your checkpoints")


def test_why_do_i_see_no_difference(opened: Callable[..., Any]):
    page = opened()
    clicked(page, "compare", "dpo_compare_strengths")
    fill(page, "dpo_compare_strengths", "1e-9")
    clicked(page, "dpo_compare_go")
    said(page, "dpo_compare_result", "No visible effect")


def test_is_it_better_on_my_model(opened: Callable[..., Any]):
    page = opened()
    clicked(page, "blind", "dpo_blind_go")
    page.locator("#dpo_blind_view .dpo-blind img").first.wait_for()
    clicked(page, "dpo_blind_right")
    said(page, "dpo_blind_figures", "Win rate")
