"""`import lib_dpo`: the examples of docs/library.md run, and each function does what its command does."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lib_dpo
from lib_dpo import face
from lib_dpo.cli.arguments import make_parser
from lib_dpo.cli.main import _runs
from lib_dpo.errors import Cancelled, MismatchError, NothingToDoError, OutputError, SettingError
from lib_dpo.toy.bundled import BASE, FOLDER, REFERENCE, load
from tests import tiny

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(
    r"^## (.+?)$.*?^```python$(.*?)^```$", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.M | re.S
)
FACE = [name for name in lib_dpo.__all__ if name != "__version__"]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The bundled pair, as base.safetensors and tuned.safetensors in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOLDER / BASE, "base.safetensors")
    shutil.copy((FOLDER / BASE).with_suffix(".yaml"), "base.yaml")
    shutil.copy(FOLDER / REFERENCE, "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


@pytest.mark.newest
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers' and PEFT's own calls
def test_the_examples_run(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    assert len(EXAMPLES) >= 5
    shutil.copy("base.safetensors", "mine.safetensors")
    Path("finetunes").mkdir()
    lib_dpo.write_offset(*pair, "half.safetensors")
    lib_dpo.bake(pair[0], "half.safetensors", "finetunes/a.safetensors", strength=0.5)
    shutil.copy("half.safetensors", "finetunes/b.safetensors")
    pipeline = load().pipeline
    pipeline.unet.register_to_config(sample_size=8)  # pictures of 64 by 64, as the bundled model draws them
    pipeline.save_pretrained("my-model")
    printed = {}
    for title, code in EXAMPLES:
        exec(compile(code, f"docs/library.md, {title}", "exec"), {})
        printed[title] = capsys.readouterr().out
    four, table, pictures, fits, function, weights = printed.values()
    assert re.search(r"Right base: .*\n\d+% of the change is in the LoRA\n$", four)
    assert re.search(r"\| 4 \| \d+\.\d \| \d+\.\d% \|\n\| 8 \|", table)
    assert pictures == ""
    assert re.match(r"a\.safetensors: .*DPO.*\nb\.safetensors: .*offset", fits)
    assert re.fullmatch(r"\d+% of the function\n", function)
    assert re.search(r": up to [\d.e-]+\n", weights)
    shots = [Path(f"strength {strength}.png").read_bytes() for strength in (0, 0.5, 1)]
    assert len(set(shots)) == 3
    assert Path("mine with dpo.safetensors").is_file()
    assert Path("offset.safetensors").stat().st_size > 7e6


def test_each_function_gives_the_figures_and_the_file_of_its_command(pair: tuple[Path, Path]):
    base, tuned = pair

    def command(name: str, *arguments: object) -> dict[str, object]:
        assert tiny.run(name, *arguments, "--json", "figures.json", "--overwrite") == 0
        return json.loads(Path("figures.json").read_text(encoding="utf-8"))

    of_pair = ("--base", base, "--tuned", tuned)
    calls = [
        (lib_dpo.diff(base, tuned), ("diff", *of_pair)),
        (
            lib_dpo.extract(base, tuned, "l1.safetensors", rank=4, conv_rank=2, precision="fp32", seed=3),
            ("extract", *of_pair, "-o", "l2.safetensors", "--rank", 4, "--conv-rank", 2, "--precision", "fp32", "--seed", 3),
        ),
        (
            lib_dpo.write_offset(base, tuned, "o1.safetensors", precision="fp16"),
            ("offset", *of_pair, "-o", "o2.safetensors", "--precision", "fp16"),
        ),
        (lib_dpo.verify("l1.safetensors", base, tuned), ("verify", "--lora", "l1.safetensors", *of_pair)),
        (
            lib_dpo.extract(base, tuned, "m1.safetensors", energy=0.5, profile="full", device="cpu", method="exact"),
            (
                "extract",
                *of_pair,
                "-o",
                "m2.safetensors",
                "--energy",
                0.5,
                "--profile",
                "full",
                "--device",
                "cpu",
                "--method",
                "exact",
            ),
        ),
        (
            lib_dpo.bake(base, "o1.safetensors", "b1.safetensors", strength=0.5, blocks="MID=0", precision="bf16"),
            (
                "bake",
                "--target",
                base,
                "--offset",
                "o1.safetensors",
                "-o",
                "b2.safetensors",
                "--strength",
                0.5,
                "--blocks",
                "MID=0",
                "--precision",
                "bf16",
            ),
        ),
        (
            lib_dpo.resize("l1.safetensors", "r1.safetensors", energy=0.9, precision="fp16"),
            ("resize", "--lora", "l1.safetensors", "-o", "r2.safetensors", "--energy", 0.9, "--precision", "fp16"),
        ),
        (lib_dpo.inspect("l1.safetensors"), ("inspect", "l1.safetensors")),
        (lib_dpo.compat(base, base, tuned), ("compat", "--target", base, *of_pair)),
    ]
    for report, arguments in calls:
        figures = command(*arguments)
        expected = json.loads(json.dumps(report.as_json()))
        assert {key: figures[key] for key in expected if key != "output"} == {
            key: value for key, value in expected.items() if key != "output"
        }, arguments[0]
    for kind in "lmobr":  # their metadata hold their own names
        one, other = (load_file(Path(f"{kind}{number}.safetensors")) for number in (1, 2))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", [name for name in FACE if not name.startswith("open_")])
def test_options_are_named_as_the_command_line_names_them(name: str):
    command = {"write_offset": "offset"}.get(name, name)
    # argparse has no public way to its subcommands, nor to their options
    actions = make_parser(_runs())._subparsers._group_actions[0].choices[command]._actions  # type: ignore[union-attr]
    known = {action.dest for action in actions} | {"progress"}
    if name == "diff":
        known.add("spectra")  # --plot draws them
    assert set(inspect.signature(getattr(lib_dpo, name)).parameters) <= known


def test_opened_files_stay_open_and_paths_are_closed(pair: tuple[Path, Path]):
    lib_dpo.write_offset(*pair, "o.safetensors")
    with lib_dpo.open_model(pair[0]) as base, lib_dpo.open_offset("o.safetensors") as offset:
        lib_dpo.bake(base, offset, "one.safetensors")
        lib_dpo.bake(base, offset, "two.safetensors", strength=0.5)
        assert offset.read(next(iter(offset.shapes))).numel()
    lib_dpo.extract(*pair, "l.safetensors", rank=4)
    with lib_dpo.open_offset("l.safetensors") as lora:
        kept = lib_dpo.resize(lora, "r.safetensors", rank=2).energy_kept
        assert kept == lib_dpo.resize("l.safetensors", "r.safetensors", rank=2, overwrite=True).energy_kept < 1
    assert load_file(Path("one.safetensors")).keys() == load_file(pair[0]).keys()


def test_refusals_are_those_of_the_library(pair: tuple[Path, Path]):
    base, tuned = pair
    before = base.read_bytes()
    with pytest.raises(OutputError, match="one of the inputs"):
        lib_dpo.write_offset(base, tuned, base, overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        lib_dpo.write_offset(base, tuned, tuned)
    with pytest.raises(SettingError, match="exclude one another"):
        lib_dpo.extract(base, tuned, "l.safetensors", rank=4, energy=0.5)
    with pytest.raises(SettingError, match="precision 'fp7'"):
        lib_dpo.write_offset(base, tuned, "o.safetensors", precision="fp7")
    with pytest.raises(SettingError, match="precision 'fp7' is unknown; expected one of keep"):
        lib_dpo.bake(base, tuned, "b.safetensors", precision="fp7")
    with pytest.raises(SettingError, match="precision 'fp7' is unknown; expected one of keep"):
        lib_dpo.resize(tuned, "r.safetensors", rank=4, precision="fp7")
    with pytest.raises(SettingError, match="new rank"):
        lib_dpo.resize(tuned, "l.safetensors")
    with pytest.raises(NothingToDoError, match="strength 0"):
        lib_dpo.bake(base, tuned, "b.safetensors", strength=0)
    with pytest.raises(MismatchError, match="not an offset"):
        lib_dpo.bake(base, tuned, "b.safetensors")
    assert base.read_bytes() == before
    assert {path.name for path in Path().iterdir()} == {"base.safetensors", "base.yaml", "tuned.safetensors"}


def test_progress_can_stop_it_and_leaves_nothing(pair: tuple[Path, Path]):
    seen = []

    def stop(done: int, total: int, key: str) -> None:
        seen.append((done, total, key))
        if done > total / 2:
            raise Cancelled

    for call in (
        lambda: lib_dpo.extract(*pair, "x.safetensors", rank=1, progress=stop),
        lambda: lib_dpo.write_offset(*pair, "x.safetensors", progress=stop),
    ):
        seen.clear()
        with pytest.raises(Cancelled):
            call()
        assert len(seen) > 1
        assert list(Path().glob("*x*")) == []


def test_the_face_comes_when_it_is_asked_for():
    program = (
        "import sys, lib_dpo; assert 'torch' not in sys.modules and 'lib_dpo.face' not in sys.modules, 'early'; "
        "assert {'extract', 'open_offset'} <= set(dir(lib_dpo)); lib_dpo.extract; assert 'lib_dpo.face' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(getattr(lib_dpo, name) is getattr(face, name) for name in FACE)
    with pytest.raises(AttributeError, match="no attribute 'extracts'"):
        _ = lib_dpo.extracts
    assert (ROOT / "lib_dpo" / "py.typed").is_file()
