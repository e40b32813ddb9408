"""What people type: wrong names, patterns, pasted quotes, per cent for shares, and what the command line offers instead."""

from __future__ import annotations

import os
import re
import shutil
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from lib_dpo.cli.arguments import make_parser
from lib_dpo.cli.files import folders_to_make, input_file, input_files, unquoted
from lib_dpo.cli.main import _outputs, _runs
from lib_dpo.errors import BadFileError, OutputError, SettingError, nearest
from lib_dpo.files.hub import meant_on_the_hub
from lib_dpo.maths.devices import resolve_device
from lib_dpo.settings import BUNDLED_MODEL, RankPolicy, size_meant

Refused = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair of UNets and its LoRA."""
    folder = tmp_path_factory.mktemp("small")
    base, tuned = (tiny.only_unet(tensors) for tensors in (tiny.base("sd1"), tiny.tuned("sd1")))
    files = {"base": tiny.save(folder / "base.safetensors", base), "tuned": tiny.save(folder / "tuned.safetensors", tuned)}
    files["lora"] = folder / "lora.safetensors"
    assert tiny.run("extract", *pair(files), "-o", files["lora"], "--rank", 2) == 0
    return files


def pair(files: dict[str, Path]) -> tuple[object, ...]:
    return "--base", files["base"], "--tuned", files["tuned"]


@pytest.fixture
def here(small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with copies of the small files in models/."""
    (tmp_path / "models").mkdir()
    for name, file in small.items():
        shutil.copyfile(file, tmp_path / "models" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused, and returns its one line."""

    def call(*args: object) -> str:
        capsys.readouterr()
        code = tiny.run(*args)
        out, err = capsys.readouterr()
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert "this should not happen" not in err
        return err.strip()

    return call


# ---- commands and options ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extarct", "--base", "x"], "extarct is no command, expected one of diff, extract, .*; did you mean extract?"),
        (["EXTRACT"], "did you mean extract?"),
        (["xyzzy"], "xyzzy is no command, expected one of diff, extract"),
        ([], "no command is given, expected one of diff, extract"),
        (["diff", "--base", "a", "--tunned", "b"], "--tunned is no option of `python -m lib_dpo diff`; did you mean --tuned?"),
        (["bake", "--target", "a", "--offset", "b", "-o", "c", "--strengh=0.8"], "--strengh is no option .* --strength?"),
        (["extract", "--base", "a", "--tuned", "b", "-o", "c", "--size_mb", "80"], "did you mean --size-mb?"),
        (["extract", "--base", "a", "--tuned", "b", "-o", "c", "–rank", "8"], "–rank begins with a dash .* write --rank"),
        (["inspect", "a", "—json", "b"], "—json begins with a dash .* write --json"),
        (["bake", "--target", "a", "--offset", "b", "-o", "c", "--precision", "fp61"], "one of keep, .*; did you mean fp16?"),
        (["extract", "--base", "a", "--tuned", "b", "-o", "c", "--method", "exacct"], "'exacct' is unknown; .* mean exact?"),
        (["extract", "--base", "a", "--tuned", "b", "-o", "c", "--profile", "webiu"], "did you mean webui?"),
        (["diff", "--base", "a", "--tuned", "b", "c"], "c: unknown to `python -m lib_dpo diff`"),
    ],
    ids=str,
)
def test_a_mistyped_word_offers_the_nearest(arguments: list[str], words: str, refused: Refused):
    line = refused(*arguments)
    assert re.search(words.replace("?", r"\?"), line), line


def test_nearest_prefers_the_same_name_in_another_case():
    assert nearest("DREAM", ["dreams", "dream", "cream"]) == "dream"
    assert nearest("nothing like it", ["dreams"]) is None


# ---- numbers ----


@pytest.mark.parametrize(
    ("arguments", "offer"),
    [
        (["--energy", "90%"], "0.9"),
        (["--energy", "0,9"], "0.9"),
        (["--rank", "64.0"], "64"),
        (["--size-mb", "80MB"], "80"),
        (["--size-mb", "0.08 GB"], "80"),
        (["--size-mb", "80000kB"], "80"),
        (["--rank", "sixty"], None),
        (["--rank", "1.2.3"], None),
        (["--rank", "64.5"], None),
    ],
    ids=str,
)
def test_a_number_in_other_clothes_is_offered(arguments: list[str], offer: str | None, refused: Refused):
    line = refused("extract", "--base", "a", "--tuned", "b", "-o", "c.safetensors", *arguments)
    assert f"argument {arguments[0]}: {arguments[1]!r} is not a" in line
    assert (f"; did you mean {offer}?" in line) if offer else ("did you mean" not in line)


def test_a_negative_number_with_a_minus_of_typography(refused: Refused):
    line = refused("bake", "--target", "a", "--offset", "b", "-o", "c.safetensors", "--strength=−0.5")
    assert "did you mean -0.5?" in line


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"energy": 90}, "energy 90 is too large; expected at most 1; did you mean 0.9?"),
        ({"energy": 99.5}, "did you mean 0.995?"),
        ({"size_mb": 80e6}, "expected at most 1e+06 MB; did you mean 80?"),
    ],
)
def test_per_cent_and_bytes_are_asked_about(policy: dict[str, float], words: str):
    with pytest.raises(SettingError) as refusal:
        RankPolicy(**policy)  # type: ignore[arg-type]
    assert words in str(refusal.value)


@pytest.mark.parametrize("value", [1.01, 1.5, 101.0])
def test_what_is_no_per_cent_gets_no_offer(value: float):
    with pytest.raises(SettingError) as refusal:
        RankPolicy(energy=value)
    assert "did you mean" not in str(refusal.value)


def test_a_size_in_gb_is_asked_about(small: dict[str, Path], tmp_path: Path, refused: Refused):
    line = refused("extract", *pair(small), "-o", tmp_path / "l.safetensors", "--size-mb", "0.0009")
    assert "size 0.0009 MB holds no layer" in line
    assert "did you mean 0.9? The size is in MB" in line
    line = refused("resize", "--lora", small["lora"], "-o", tmp_path / "l.safetensors", "--size-mb", "0.0009")
    assert "size 0.0009 MB holds no layer" in line
    assert "did you mean 0.9?" in line
    assert size_meant(0.08, 90) == ""  # nor would that be enough


def test_choices_are_read_in_any_case(small: dict[str, Path], tmp_path: Path):
    arguments = ("--rank", 2, "--precision", "FP32", "--method", "Exact", "--profile", "Portable")
    assert tiny.run("extract", *pair(small), "-o", tmp_path / "l.safetensors", *arguments) == 0


@pytest.mark.newest
def test_a_mistyped_sampler_offers_the_nearest(here: Path, refused: Refused):
    model = BUNDLED_MODEL / "toy-shapes.safetensors"
    line = refused(
        "compare", "--model", model, "--offset", "models/lora.safetensors", "--prompt", "a", "-o", "g.png", "--sampler", "eler"
    )
    assert re.search(r"sampler 'eler' is unknown; expected one of Euler, .*; did you mean Euler\?", line), line


@pytest.mark.parametrize(("typed", "meant"), [("cuda0", "cuda"), ("gpu", "cuda"), ("cpuu", "cpu"), ("npu-card", None)])
def test_a_mistyped_device_offers_the_nearest(typed: str, meant: str | None):
    with pytest.raises(SettingError) as refusal:
        resolve_device(typed)
    told = str(refusal.value)
    assert (f"; did you mean {meant}?" in told) if meant else ("did you mean" not in told)
    assert resolve_device(" CPU").type == "cpu"


def test_a_mistyped_block_offers_the_nearest(here: Path, refused: Refused):
    files = ("--target", "models/base.safetensors", "--offset", "models/lora.safetensors", "-o", "b.safetensors")
    assert "did you mean IN00?" in refused("bake", *files, "--blocks", "IN0=0.5")
    assert "did you mean MID?" in refused("bake", *files, "--blocks", "IN00=1,MIDD=0")
    assert "did you mean" not in refused("bake", *files, "--blocks", "IN00=x")  # the name is right
    assert tiny.run("bake", *files, "--blocks", "in=0.5,Mid=0") == 0


# ---- files ----


def test_a_mistyped_file_offers_the_nearest(here: Path, refused: Refused):
    for typed in ("models/bse.safetensors", "models/BASE.safetensors", "models/base", "models/base.safetensor"):
        assert f"{typed}: does not exist; did you mean {Path('models', 'base.safetensors')}?" in refused("inspect", typed)
    assert f"did you mean {Path('models')}?" in refused("inspect", "model/base.safetensors")
    line = refused("diff", "--base", "models/base.safetensors", "--tuned", "models/tunde.safetensors")
    assert f"did you mean {Path('models', 'tuned.safetensors')}?" in line
    assert "holds base.safetensors, lora.safetensors, tuned.safetensors" in refused("inspect", "models/xyz")
    (here / "empty").mkdir()
    assert "the folder empty holds no model: check the path" in refused("inspect", "empty/x.safetensors")
    assert "did you mean models" in refused("app", "--models", "modles").replace(str(here) + os.sep, "")
    assert "is a file, expected a folder" in refused("app", "--models", "models/base.safetensors")


def test_home_folders_and_patterns_are_expanded(here: Path, refused: Refused, capsys: pytest.CaptureFixture[str]):
    assert input_files("~/models/base.safetensors") == [here / "models" / "base.safetensors"]
    assert tiny.run("inspect", "~/models/b*.safetensors") == 0
    assert "base.safetensors: a UNet" in capsys.readouterr().out
    assert tiny.run("diff", "--base=~/models/b*", "--tuned", "~/models/t*", "--json", "~/made/here/report.json") == 0
    assert (here / "made" / "here" / "report.json").is_file()
    assert f"made the folder {here / 'made' / 'here'}\n" in capsys.readouterr().out
    line = refused("diff", "--base", "models/*.safetensors", "--tuned", "models/tuned.safetensors")
    assert "models/*.safetensors: fits 3 files, base.safetensors, lora.safetensors, tuned.safetensors; expected one" in line
    assert tiny.run("inspect", "**/lora.safetensors") == 0
    assert "lora.safetensors: a LoRA" in capsys.readouterr().out
    assert "models/*.ckpt: no file fits this pattern" in refused("inspect", "models/*.ckpt")
    assert "is a pattern, expected the name of one file" in refused("diff", "--base", "a", "--tuned", "b", "--json", "*.json")


def test_brackets_in_names_are_themselves_before_they_are_patterns(here: Path):
    for name in ("merge [v1].safetensors", "merge [v2].safetensors", "v.safetensors"):
        shutil.copyfile("models/base.safetensors", name)
    assert input_files("merge [v1].safetensors") == [Path("merge [v1].safetensors")]
    assert input_files("merge [v*].safetensors") == [Path("merge [v1].safetensors"), Path("merge [v2].safetensors")]
    assert input_files("[uvw].safetensors") == [Path("v.safetensors")]


@pytest.mark.parametrize(
    "typed", ['"{}"', "'{}'", "“{}”", "„{}“", "‘{}’", "«{}»", " '{}' ", '{}"', "`{}`"], ids=lambda text: ascii(text)
)
def test_quotes_that_were_pasted_along_are_taken_off(here: Path, typed: str):
    assert input_files(typed.format("models/base.safetensors")) == [Path("models/base.safetensors")]


def test_quotes_that_belong_to_a_name_stay(here: Path):
    shutil.copyfile("models/base.safetensors", "'quoted'")
    assert input_files("'quoted'") == [Path("'quoted'")]
    assert unquoted("l'été") == "l'été"


def test_names_with_spaces_other_scripts_and_slashes(here: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("mein modell.safetensors", "模型 ü.safetensors"):
        shutil.copyfile("models/base.safetensors", here / "models" / name)
        assert tiny.run("inspect", f"models/{name}") == 0
        assert f"{name}: a UNet" in capsys.readouterr().out
    decomposed = unicodedata.normalize("NFD", "模型 ü.safetensors")
    assert [_.name for _ in input_files(f"models/{decomposed}")] in (["模型 ü.safetensors"], [decomposed])
    assert tiny.run("inspect", "models/base.safetensors/") == 0
    assert "base.safetensors: a UNet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Hub:own/model", "hub:own/model"),
        ("hub:/own/model", "hub:own/model"),
        ("hub://own/model", "hub:own/model"),
        ("hub: own/model", "hub:own/model"),
        ("hub/own/model", "hub:own/model"),
        (r"hub:own\model\a.safetensors", "hub:own/model/a.safetensors"),
        ("hf:own/model", "hub:own/model"),
        ("huggingface:own/model/", "hub:own/model"),
        ("https://huggingface.co/own/model", "hub:own/model"),
        ("https://huggingface.co/own/model/tree/main", "hub:own/model"),
        ("https://huggingface.co/own/model/resolve/main/unet/a.safetensors?download=true", "hub:own/model/unet/a.safetensors"),
    ],
)
def test_a_misspelt_name_on_the_hub_offers_the_right_one(typed: str, meant: str, here: Path):
    assert meant_on_the_hub(typed) == meant
    with pytest.raises(SettingError) as refusal:
        input_file(SimpleNamespace(yes=False), typed)  # type: ignore[arg-type]
    assert meant in str(refusal.value)


def test_an_address_of_the_web_is_no_file(here: Path):
    with pytest.raises(SettingError, match="download the file"):
        input_files("https://civitai.com/models/240850")
    with pytest.raises(BadFileError, match="does not exist"):
        input_files("hubble/own/model")


# ---- outputs ----


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("lora", "lora: expected a name that ends in .safetensors; write lora.safetensors"),
        ("dpo-sd1.5", "write dpo-sd1.5.safetensors"),
        ("lora.ckpt", "write lora.safetensors"),
        ("models/", "'models/' is a folder, expected the name of a file"),
        ("new/", "'new/' is a folder"),
        ("models", "models: is a folder"),
        ("lora*.safetensors", "is a pattern"),
        ("models/base.safetensors", "is one of the inputs (--base)"),
    ],
)
def test_an_output_name_that_cannot_be(output: str, words: str, here: Path, refused: Refused):
    line = refused("extract", "--base", "models/base.safetensors", "--tuned", "models/tuned.safetensors", "-o", output)
    assert words in line


def test_a_folder_that_is_made_is_said(here: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ("resize", "--lora", "models/lora.safetensors", "--rank", 1, "-o")
    assert tiny.run(*arguments, "new/folder/l.safetensors") == 0
    assert f"made the folder {Path('new', 'folder')}\n" in capsys.readouterr().out
    assert tiny.run(*arguments, "new/folder/l2.safetensors") == 0
    assert "made the folder" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["demo", "-o", "new/demo"], "new/demo"),
        (
            ["compare", "--model", "m", "--offset", "o", "--prompt", "p", "-o", "g.png", "--each", "new/pictures"],
            "new/pictures",
        ),
        (["diff", "--base", "b", "--tuned", "t", "--plot", "new/p.png"], "new"),
    ],
)
def test_every_folder_that_may_be_made_is_looked_at_before(here: Path, arguments: list[str], folder: str):
    assert folders_to_make(_outputs(make_parser(_runs()).parse_args(arguments))) == [Path(folder)]


def test_a_model_and_an_offset_in_each_others_place(here: Path, refused: Refused):
    for command, option, end in (("bake", "--target", ".safetensors"), ("compare", "--model", ".png")):
        rest = ("--prompt", "a cat") if command == "compare" else ()
        given = (option, "models/lora.safetensors", "--offset", "models/base.safetensors", "-o", f"out{end}", *rest)
        line = refused(command, *given)
        assert f"{option} lora.safetensors is a LoRA, --offset base.safetensors a UNet: exchange them" in line


# ---- inspect, of several ----


def test_inspect_takes_several_and_hides_none(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "models" / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    report = here / "report.json"
    code = tiny.run("inspect", "models/*.safetensors", "models/base.safetensors", "nothing.safetensors", "--json", report)
    out, err = capsys.readouterr()
    assert code == 2
    assert [line.split(":")[1].split("/")[-1].strip() for line in err.splitlines()] == [
        "broken.safetensors",
        "nothing.safetensors",
    ]
    assert all(f"{name}.safetensors: " in out for name in ("base", "lora", "tuned"))
    assert out.count("base.safetensors: ") == 1  # named twice, told once
    assert out.endswith("5 files, 2 of them refused\n")
    told = tiny.read_json(report)
    assert told["refused"] == 2
    assert [Path(each["path"]).name for each in told["files"]] == [
        "base.safetensors", "broken.safetensors", "lora.safetensors", "tuned.safetensors", "nothing.safetensors"
    ]  # fmt: skip
    assert ["error" in each for each in told["files"]] == [False, True, False, False, True]
    assert told["inputs"]["file"] == ["models/*.safetensors", "models/base.safetensors", "nothing.safetensors"]


def test_inspect_of_one_says_it_in_both_forms(here: Path):
    told = tiny.figures(here / "report.json", "inspect", "models/base.safetensors")
    assert told["kind"] == "unet"
    assert [each["sha256"] for each in told["files"]] == [told["sha256"]]
    assert told["inputs"]["file"] == "models/base.safetensors"
    both = tiny.figures(here / "report.json", "inspect", "models/base.safetensors", "models/lora.safetensors")
    assert [each["kind"] for each in both["files"]] == ["unet", "lora"]
    assert both["refused"] == 0


# ---- ports ----


def test_a_port_in_use_is_said_and_another_offered():
    from lib_dpo.webui.app import check_port

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OutputError) as refusal:
            check_port("127.0.0.1", port)
    told = str(refusal.value)
    assert told.startswith(f"port {port} is used by another program; choose another one, such as --port ")
    assert "GRADIO" not in told
    check_port("127.0.0.1", int(told.split()[-1]))
    with pytest.raises(OutputError, match="no address of this machine"):
        check_port("203.0.113.7", port)
    with pytest.raises(OutputError, match="no address of this machine"):
        check_port("no.such.host.invalid", port)
    with pytest.raises(OutputError, match="port 0 does not exist"):
        check_port("127.0.0.1", 0)
