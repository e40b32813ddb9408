"""What pages add to cards: the best strength of a blind test, and a picture before and after from a comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import webui_files
from PIL import Image
from test_blind import pair, start
from webui_files import fake

from lib_dpo.files.ours import is_our_png
from lib_dpo.hosts.base import Picture, Request
from lib_dpo.offsets.lora.card import card_file, preview_file
from lib_dpo.pictures.preview import preview_png
from lib_dpo.webui.comparing import Asked, compare
from lib_dpo.webui.results import Comparison
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import blind as page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return webui_files.with_offsets(tmp_path_factory.mktemp("cards"))


@pytest.fixture
def session(files: Path, tmp_path: Path) -> Session:
    return webui_files.open_session(files, tmp_path / "models")


def lora(session: Session, name: str = "dpo") -> Path:
    return fake(session).lora_dir / f"{name}.safetensors"


def compared(session: Session, offset: str = "dpo", strengths: str = "0.5, 1, 1.5", **options: Any) -> Comparison:
    asked = Asked(offset, ["a cat", "a dog"], strengths=strengths, seeds="3", steps=2, width=64, height=64, **options)
    found: Comparison = session.jobs.run("compare", lambda job: compare(session, job, asked))
    return found


# ---- the preview ----


def test_a_comparison_gives_the_card_its_picture(session: Session, monkeypatch: pytest.MonkeyPatch):
    def generate(request: Request, patch: Any, strength: float) -> Picture:
        return Picture(Image.new("RGB", (64, 64), (int(100 * strength), len(request.prompt), 0)), "")

    monkeypatch.setattr(session.host, "generate", generate)
    found = compared(session)
    with Image.open(preview_file(lora(session))) as image:
        preview = image.convert("RGB")
    assert preview.crop((0, 0, 64, 64)).getcolors() == [(64 * 64, (0, 5, 0))]
    assert preview.crop((preview.width - 64, 0, preview.width, 64)).getcolors() == [(64 * 64, (100, 5, 0))]
    assert is_our_png(preview_file(lora(session)).read_bytes())
    assert any("now the first pair at strength 1" in remark for remark in found.remarks)


@pytest.mark.parametrize("options", [{"blocks": "IN=0"}, {"rank": 1}, {"strengths": "1.5, 2"}, {"strengths": "-1"}])
def test_no_picture_of_what_the_lora_is_not(options: dict[str, Any], session: Session):
    assert not [remark for remark in compared(session, **options).remarks if "card" in remark]
    assert not preview_file(lora(session)).exists()


def test_offset_files_get_none_and_a_persons_stays(session: Session):
    compared(session, "exact")
    assert not list(fake(session).reference_dir.glob("*.png"))
    mine = lora(session).with_suffix(".png")
    mine.write_bytes(b"mine")
    compared(session)
    assert mine.read_bytes() == b"mine"
    assert not preview_file(lora(session)).exists()


def test_where_no_picture_can_be_written_the_comparison_stands(session: Session):
    preview_file(lora(session)).mkdir()
    assert any("could not be given a picture" in remark for remark in compared(session).remarks)


def test_large_pictures_become_small_ones():
    before, after = Image.new("RGB", (1024, 768), "red"), Image.new("RGBA", (1024, 768), "blue")
    with Image.open(io.BytesIO(preview_png(before, after))) as image:
        assert image.size == (512 + 4 + 512, 384)
        assert [image.convert("RGB").getpixel((x, 200)) for x in (10, 1020)] == [(255, 0, 0), (0, 0, 255)]


# ---- the preferred weight ----


def voted(session: Session, count: int, offset: str = "dpo", **options: Any) -> None:
    start(session, strengths="0.5, 1, 2", offset=offset, **options)
    liked = {0.0: 0.0, 0.5: 2.0, 1.0: 3.0, 2.0: -1.0}
    for _ in range(count):
        asked = pair(session)
        better = "left" if (liked[asked.a] > liked[asked.b]) == (asked.side == "left") else "right"
        session.blind.vote(asked.id, better)


def test_the_best_strength_becomes_the_preferred_weight(session: Session):
    voted(session, 24)
    curve = session.blind.figures().curve
    assert curve is not None
    button, said = page.offer(session)
    assert (button["visible"], said) == (True, "")
    assert button["value"] == f"Keep {curve.best:g} as this LoRA's preferred weight"
    html = page.keep_weight(session)
    assert f"{curve.best:g} is the preferred weight of dpo now" in html
    assert json.loads(card_file(lora(session)).read_bytes())["preferred weight"] == curve.best
    card_file(lora(session)).write_bytes(b'{"preferred weight": 0.80, "notes": "mine"}')
    assert "instead of 0.8" in page.keep_weight(session)
    assert card_file(lora(session)).read_bytes() == b'{"preferred weight": %g, "notes": "mine"}' % curve.best
    card_file(lora(session)).write_bytes(b"[]")
    assert "no JSON object" in page.keep_weight(session)


def test_no_weight_is_offered_without_a_best_strength_of_the_whole_lora(session: Session):
    assert page.offer(session)[0]["visible"] is False  # no test
    assert 'role="alert"' in page.keep_weight(session)
    voted(session, 3)
    assert page.offer(session)[0]["visible"] is False  # too few
    assert "too few so far" in page.keep_weight(session)
    voted(session, 24, blocks="IN=0.5")
    assert page.offer(session)[0]["visible"] is False
    voted(session, 24, offset="exact")
    assert page.offer(session)[0]["visible"] is False  # an offset file has no card
