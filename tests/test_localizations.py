"""The translations of the tab and the script: none missing, none stale, and none that lost what it must keep."""

from __future__ import annotations

import re

import pytest

from tools.localizations import FOLDER, LANGUAGES, strings, translations

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

_KEPT = re.compile(r"[A-Z]{2,4}\d*=[\d.]+|models/DPO|txt2img|\bfp\d+\b|float32|ComfyUI|diffusers|\bLoKr\b|LoRAs?|\b\d[\d.]*\b")


@pytest.fixture(scope="module")
def words() -> list[str]:
    return strings()


def test_the_words_are_those_of_all_pages(words: list[str]):
    assert len(words) == len(set(words)) > 150
    for known in (
        "Extract DPO LoRA",
        "Undo",
        "Look for new files",
        "DPO offset",
        "as the reference",
        "Folder of DPO references and offset files",
    ):
        assert known in words
    assert not [text for text in words if "<" in text or text != text.strip()]


def test_every_language_has_a_file_and_no_other_has():
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{language}.json" for language in LANGUAGES]


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_and_nothing_is_stale(language: str, words: list[str]):
    found = translations(language)
    assert not [text for text in words if text not in found], "missing"
    assert not [text for text in found if text not in words], "stale"
    assert list(found) == words, "in the order of the page"


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_plain_text_and_keep_numbers_and_names(language: str):
    for text, translated in translations(language).items():
        assert translated == translated.strip() != "", text
        assert "<" not in translated, text
        kept = {part.removesuffix("s") if part == "LoRAs" else part for part in _KEPT.findall(text)}
        assert not [part for part in kept if part not in translated], (text, translated)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_controls_that_differ_become_one_word_on_a_page(language: str):
    found = translations(language)
    buttons = (
        "Bake",
        "Undo",
        "Extract",
        "Compare",
        "Blind test",
        "Inspect",
        "Extract DPO LoRA",
        "Write offset file",
        "Interrupt",
        "Analyse",
    )
    assert len({found[name] for name in buttons}) == len(buttons)
