"""The cards of LoRAs: what WebUIs read beside one, and that nothing of a person's is ever lost."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from safetensors import safe_open

import lib_dpo
from lib_dpo.cli.text import extract_text, inspect_text
from lib_dpo.errors import OutputError, SettingError
from lib_dpo.files.ours import is_our_json, is_our_png, signed_json, signed_png
from lib_dpo.offsets.lora import card

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pair")
    licence = {"modelspec.license": "CreativeML Open RAIL++-M", "format": "pt"}
    base = tiny.save(folder / "v1-5.safetensors", tiny.base())
    return base, tiny.save(folder / "dpo-sd15.safetensors", tiny.tuned(rms=1e-3), metadata=licence)


@pytest.fixture(scope="module")
def made(pair: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "l.safetensors"
    extracted(pair, output)
    return output


@pytest.fixture
def lora(made: Path, tmp_path: Path) -> Path:
    """A LoRA with its card in a folder of its own."""
    for file in (made, card.card_file(made)):
        shutil.copy(file, tmp_path)
    return tmp_path / made.name


def extracted(pair: Files, output: Path, **options: Any) -> Any:
    return lib_dpo.extract(*pair, output, rank=2, precision="fp32", **options)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def png(colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 4), colour).save(data, format="PNG")
    return data.getvalue()


def test_a_new_lora_has_the_card_that_webuis_read(pair: Files, tmp_path: Path):
    report = extracted(pair, tmp_path / "dpo-v1.5.safetensors")
    content = json.loads((tmp_path / "dpo-v1.5.json").read_text("utf-8"))
    assert (report.card, report.card_text, report.as_json()["card"]) == ("written", "", "written")
    kept = float(metadata(report.path)["dpo.energy_kept"])
    assert content["description"] == f"{100 * kept:.1f} % of what turned v1-5 into dpo-sd15, as a LoRA for SD 1.x."
    assert (content["sd version"], content["activation text"]) == ("SD1", "")
    assert "preferred weight" not in content  # nobody measured one
    assert content["notes"].splitlines() == [
        f"Energy kept: {100 * kept:.1f} % of the change",
        "Base: v1-5",
        "Reference: dpo-sd15",
        "Licence: CreativeML Open RAIL++-M",
    ]


def test_the_metadata_name_the_file_the_base_and_a_licence_that_someone_stated(pair: Files, tmp_path: Path):
    said = metadata(extracted(pair, tmp_path / "l.safetensors").path)
    assert (said["ss_output_name"], said["ss_sd_model_name"]) == ("l", "v1-5.safetensors")
    assert said["modelspec.license"] == "CreativeML Open RAIL++-M"
    silent = tiny.save(tmp_path / "silent.safetensors", tiny.tuned(rms=1e-3))
    assert "modelspec.license" not in metadata(extracted((pair[0], silent), tmp_path / "s.safetensors").path)
    lib_dpo.resize(tmp_path / "l.safetensors", tmp_path / "smaller.safetensors", rank=1)
    smaller = metadata(tmp_path / "smaller.safetensors")
    assert (smaller["ss_output_name"], smaller["ss_sd_model_name"]) == ("smaller", "v1-5.safetensors")


@pytest.mark.parametrize("arch", ["sd2", "sdxl"])
def test_the_version_is_in_the_words_of_webuis(arch: str, tmp_path: Path):
    base = tiny.save(tmp_path / "base.safetensors", tiny.base(arch))
    tuned = tiny.save(tmp_path / "tuned.safetensors", tiny.tuned(arch, rms=1e-3))
    lib_dpo.extract(base, tuned, tmp_path / "l.safetensors", form="exact")
    assert json.loads((tmp_path / "l.json").read_bytes())["sd version"] == {"sd2": "SD2", "sdxl": "SDXL"}[arch]


def test_our_own_card_and_preview_are_replaced_with_their_lora(pair: Files, tmp_path: Path):
    output = tmp_path / "l.safetensors"
    extracted(pair, output)
    card.keep_weight(output, 1.4)
    assert card.write_preview(output, png()) == tmp_path / "l.preview.png"
    report = extracted(pair, output, overwrite=True)
    assert report.card == "replaced"
    assert card.WEIGHT not in json.loads((tmp_path / "l.json").read_bytes())  # it was measured with the other file
    assert not (tmp_path / "l.preview.png").exists()


def _rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """As the editor of a WebUI saves a card: `json.dump` with four spaces, all of it."""

    def saved(before: bytes) -> bytes:
        content = json.loads(before)
        change(content)
        return json.dumps(content, indent=4, ensure_ascii=False).encode()

    return saved


@pytest.mark.parametrize(
    "person",
    [
        _rewritten(lambda content: content.update({"description": "mine"})),
        _rewritten(lambda content: content.update({"negative text": ""})),
        _rewritten(lambda content: content.pop("notes")),
        lambda _: b'{"preferred weight": 0.8}',
        lambda _: b"",
        lambda _: b"\xff\xfe no text",
        lambda _: b'["a list"]',
        lambda _: b'{"sd-webui-dpo": {"sha256": "00"}}',
    ],
)
def test_what_a_person_made_or_changed_is_kept(person: Callable[[bytes], bytes], lora: Path):
    mine = person(card.card_file(lora).read_bytes())
    card.card_file(lora).write_bytes(mine)
    assert card.write_card(lora) == "kept"
    assert card.card_file(lora).read_bytes() == mine
    assert not card.read_card(lora).ours


def test_it_is_said_that_a_card_was_kept(pair: Files, lora: Path):
    card.card_file(lora).write_bytes(b'{"preferred weight": 0.8}')
    report = extracted(pair, lora, overwrite=True)
    assert (report.card, card.card_file(lora).read_bytes()) == ("kept", b'{"preferred weight": 0.8}')
    assert "l.json was kept" in report.card_text
    assert report.card_text in extract_text(report)
    assert "beside it for the lists of WebUIs: l.json (made or changed by someone, preferred weight 0.8)" in inspect_text(
        lib_dpo.inspect(lora)
    )


def test_a_card_that_was_only_laid_out_anew_is_ours(lora: Path):
    content = json.loads(card.card_file(lora).read_bytes())
    card.card_file(lora).write_text(json.dumps(dict(reversed(content.items()))), "utf-8")
    assert card.write_card(lora) == "replaced"


def test_a_card_that_cannot_be_written_does_not_cost_the_lora(pair: Files, tmp_path: Path):
    (tmp_path / "l.json").mkdir()
    report = extracted(pair, tmp_path / "l.safetensors")
    assert (report.card, report.path.is_file()) == ("failed", True)
    assert "no card" in report.card_text


def test_a_report_of_that_name_and_no_card_at_all(pair: Files, tmp_path: Path):
    files = ("--base", pair[0], "--tuned", pair[1], "--rank", 2)
    figures = tiny.figures(tmp_path / "l.json", "extract", *files, "-o", tmp_path / "l.safetensors")
    assert (figures["command"], figures["card"]) == ("extract", "none")
    assert tiny.run("extract", *files, "-o", tmp_path / "m.safetensors", "--no-card") == 0
    assert (
        tiny.run("resize", "--lora", tmp_path / "m.safetensors", "-o", tmp_path / "n.safetensors", "--rank", 1, "--no-card")
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.json", "l.safetensors", "m.safetensors", "n.safetensors"]


def test_a_smaller_lora_takes_over_what_a_person_wrote_for_prompts(lora: Path, tmp_path: Path):
    mine = {"activation text": "masterwork", "preferred weight": 0.8, "notes": "to try", "description": "of mine"}
    (tmp_path / "l.json").write_text(json.dumps(mine), "utf-8")
    lib_dpo.resize(lora, tmp_path / "s.safetensors", rank=1)
    found = json.loads((tmp_path / "s.json").read_bytes())
    assert (found["activation text"], found["preferred weight"]) == ("masterwork", 0.8)
    assert found["description"] != "of mine"
    assert any(line.startswith("Resized: rank 1, from l,") for line in found["notes"].splitlines())
    assert is_our_json((tmp_path / "s.json").read_bytes())


# ---- the preferred weight ----


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"{}", b'{"preferred weight": 1.4}'),
        (b'{ "a": 1.10 }', b'{ "preferred weight": 1.4, "a": 1.10 }'),
        (b'{"a":1}', b'{"preferred weight": 1.4, "a":1}'),
        (b'{"preferred weight" :0.80, "b": [1,  2]}\n', b'{"preferred weight" :1.4, "b": [1,  2]}\n'),
        (
            b'\r\n{\r\n\t"notes": "a \\"preferred weight\\": 3 }",\r\n\t"preferred weight": null\r\n}',
            b'\r\n{\r\n\t"notes": "a \\"preferred weight\\": 3 }",\r\n\t"preferred weight": 1.4\r\n}',
        ),
        (
            '{\n    "in": {"preferred weight": 2},\n    "é": "ü"\n}'.encode(),
            '{\n    "preferred weight": 1.4,\n    "in": {"preferred weight": 2},\n    "é": "ü"\n}'.encode(),
        ),
    ],
)
def test_of_a_persons_card_one_value_changes_and_no_other_character(before: bytes, after: bytes, tmp_path: Path):
    (tmp_path / "l.json").write_bytes(before)
    said = card.keep_weight(tmp_path / "l.safetensors", 1.4)
    assert (tmp_path / "l.json").read_bytes() == after
    assert json.loads(after)["preferred weight"] == 1.4
    assert "all else in it stays" in said


def test_our_card_stays_ours_with_a_preferred_weight_and_a_lora_without_one_gets_one(lora: Path, tmp_path: Path):
    before = json.loads((tmp_path / "l.json").read_bytes())
    card.keep_weight(lora, 1.4)
    after = json.loads((tmp_path / "l.json").read_bytes())
    assert is_our_json((tmp_path / "l.json").read_bytes())
    assert {key: after[key] for key in before if key != "sd-webui-dpo"} == {
        key: value for key, value in before.items() if key != "sd-webui-dpo"
    }
    assert lib_dpo.inspect(lora).as_json()["card"] == {
        "file": "l.json", "ours": True, "preferred_weight": 1.4, "preview": None, "preview_ours": False,
    }  # fmt: skip
    (tmp_path / "l.json").unlink()
    card.keep_weight(lora, 0.7)
    assert card.read_card(lora).weight == 0.7


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_no_weight_is_kept_that_webuis_would_not_take(weight: float, tmp_path: Path):
    with pytest.raises(SettingError, match="preferred weight"):
        card.keep_weight(tmp_path / "l.safetensors", weight)
    assert not (tmp_path / "l.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": ', b"\xff"])
def test_a_card_that_is_none_is_refused_and_kept(content: bytes, tmp_path: Path):
    (tmp_path / "l.json").write_bytes(content)
    with pytest.raises(OutputError, match="no JSON object"):
        card.keep_weight(tmp_path / "l.safetensors", 1.0)
    assert (tmp_path / "l.json").read_bytes() == content


# ---- the preview ----


@pytest.mark.parametrize("name", ["l.png", "l.jpg", "l.preview.png", "l.preview.webp", "l.jpeg", "l.gif"])
def test_a_preview_of_a_persons_stays_and_keeps_ours_away(name: str, lora: Path, tmp_path: Path):
    (tmp_path / name).write_bytes(png("blue"))
    assert card.write_preview(lora, png()) is None
    assert (tmp_path / name).read_bytes() == png("blue")
    assert card.read_card(lora).as_json()["preview"] == name


def test_no_preview_is_written_beside_the_lora_of_others(tmp_path: Path):
    tensors = {"lora_unet_x.alpha": tiny.torch.tensor(1.0)}
    tiny.save(tmp_path / "other.safetensors", tensors)
    assert card.write_preview(tmp_path / "other.safetensors", png()) is None
    assert not (tmp_path / "other.preview.png").exists()


def test_a_preview_is_a_picture_that_shows_who_made_it():
    signed = signed_png(png())
    assert is_our_png(signed)
    with Image.open(io.BytesIO(signed)) as image, Image.open(io.BytesIO(png())) as plain:
        image.load()  # which checks the sums of all chunks
        assert image.tobytes() == plain.tobytes()
        resaved = io.BytesIO()
        image.save(resaved, format="PNG", pnginfo=None)
    changed = bytearray(signed)
    changed[-20] ^= 1
    for other in (png(), bytes(changed), signed[:-3], signed + b"x", b"", signed_png(png()) + png(), resaved.getvalue()):
        assert not is_our_png(other)


def test_proofs_in_json():
    ours = signed_json({"a": 1, "é": [None, 0.1]})
    assert is_our_json(ours)
    for other in (ours.replace(b"0.1", b"0.2"), b"{}", b"", ours[:-3], ours.replace(b'"a": 1', b'"a": true')):
        assert not is_our_json(other)
