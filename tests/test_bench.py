"""The benchmark runs to its end on a small pair, and its figures make sense."""

from __future__ import annotations

import json
import shutil
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bench.floors import Needs, Rates, of_products, of_recompression, of_spectra
from bench.measure import busy
from bench.tour import tour
from lib_dpo.families.keymap import LoraModule
from lib_dpo.families.synthetic import small_pair
from lib_dpo.offsets.layers import Layer

pytestmark = [pytest.mark.newest, pytest.mark.slow]  # LyCORIS is one of the contestants

CONTESTANTS = ["randomized", "exact", "auto", "tuned", "svd_lowrank", "full_matrix", "lycoris"]


def bench(*arguments: str) -> int:
    from bench.__main__ import main

    return main(["--small", "--arch", "sd1", *arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        code = bench("--folder", str(folder / "pairs"), "--json", str(folder / "f.json"), "--markdown", str(folder / "f.md"))
    assert code == 0
    assert list((folder / "pairs").iterdir()) == []
    return json.loads((folder / "f.json").read_text()), (folder / "f.md").read_text()


def test_everyone_has_a_row_with_energies_up_to_the_optimum(run: tuple[dict[str, Any], str]):
    rows = run[0]["architectures"]["sd1"]["contest"]
    assert [row["name"] for row in rows] == CONTESTANTS
    shapes = len(rows[0]["seconds_by_shape"])
    for row in rows:
        samples = row["samples_per_shape"] or 282
        assert min(samples * shapes, 282) >= row["layers"] >= shapes
        assert (row["layers"] == 282) is (row["samples_per_shape"] is None)
        assert row["seconds"] > 0
        # the optimum is of a float32 Gram matrix; LyCORIS writes layers whole that have no more than twice the rank
        assert 0.8 < row["of_optimum"] < 1 + 1e-5
        assert row["energy_kept"] == pytest.approx(row["of_optimum"] * row["optimum"])
        assert f"| {row['title']} |" in run[1]


def test_ours_is_near_the_optimum_and_the_clamp_is_not(run: tuple[dict[str, Any], str]):
    share = {row["name"]: row["of_optimum"] for row in run[0]["architectures"]["sd1"]["contest"]}
    assert share["exact"] == pytest.approx(1, abs=1e-5)
    assert share["randomized"] > 0.999
    assert share["tuned"] >= share["svd_lowrank"]
    assert share["full_matrix"] < 0.995


def test_command_is_set_beside_reading_and_multiplying(run: tuple[dict[str, Any], str]):
    command = run[0]["architectures"]["sd1"]["command"]
    assert command["ratio"] == pytest.approx(command["wall"] / (command["read"] + command["operations"] / command["rate"]))
    assert command["peak"] > 0
    kept = next(row for row in run[0]["architectures"]["sd1"]["contest"] if row["name"] == "auto")["energy_kept"]
    assert command["energy_kept"] == pytest.approx(kept, abs=0.01)  # of fp16 factors, and of biases and norms too
    assert "| whole command |" in run[1]


def test_every_command_runs_and_what_it_writes_holds(run: tuple[dict[str, Any], str]):
    stops = run[0]["architectures"]["sd1"]["tour"]
    commands = ["inspect", "diff", "extract", "verify", "resize", "bake", "offset", "bake", "compat"]
    assert [stop["title"].split("`")[1].split()[0] for stop in stops] == commands
    assert all(stop["seconds"] > 0 and f"| {stop['title']} |" in run[1] for stop in stops)
    found = [stop["found"] for stop in stops]
    assert (found[0], found[2]) == ("sd1 checkpoint, 1,135 tensors", found[3])  # extract and verify agree
    assert found[5] == "449 of 449 other tensors as they were"
    same, total = (int(number.replace(",", "")) for number in found[7].split()[0:3:2])
    assert same == total > 1e6
    assert found[7].endswith("as in the tuned file; " + found[5])
    assert float(found[8].split()[2]) == pytest.approx(1, abs=0.02)  # less than one: fp16 rounds the smallest changes away


def test_every_command_stands_beside_its_floors(run: tuple[dict[str, Any], str]):
    figures = run[0]["architectures"]["sd1"]
    lines = {line.split(" | ")[0].strip("| "): line for line in run[1].split("beside its floors")[1].splitlines()}
    for stop, floor in zip(figures["tour"], figures["floors"], strict=True):
        assert (
            0 < figures["rates"]["start"] < floor < 2 * stop["seconds"]
        )  # a machine is noisy; most of a small one is the start
        assert lines[stop["title"]].endswith(f"| {stop['seconds'] / floor:.2f} |")
        assert stop["needs"]["read"] >= sum(stop["needs"]["hashed"])
        assert stop["needs"]["written"] == stop["written"]


def test_a_floor_is_start_bytes_and_operations():
    rates = Rates(start=1, reading=100, writing=50, hashing=10, multiplying=1000, cores=2)
    needs = Needs(read=400, written=100, hashed=(100, 300), operations=2000)
    assert needs.bandwidth(rates) == 4 + 2
    assert needs.arithmetic(rates) == 30 + 2  # one core has the larger file
    assert needs.floor(rates) == 1 + 6 + 32
    assert replace(needs, hashed=(100, 100)).arithmetic(rates) == 10 + 2
    assert Needs(100).floor(rates) == 1 + 1


def test_operations_are_those_of_the_field():
    layer = Layer(LoraModule("lora_unet_k", "k.weight"), (20, 10, 3, 3), "pair")  # 20 x 90
    assert of_spectra([layer]) == pytest.approx(2 * 20 * 20 * 90 + 4 / 3 * 20**3)
    assert of_products([layer, layer], 4) == 2 * (2 * 20 * 90 * 4)
    assert of_products([layer], 64) == 2 * 20 * 90 * 20  # no rank beyond the short side
    assert of_recompression([layer], 4) == 6 * (20 + 90) * 16


def test_goals_stand_below_with_what_was_reached(run: tuple[dict[str, Any], str]):
    goals = run[0]["architectures"]["sd1"]["goals"]
    lines = [line for line in run[1].splitlines() if line.startswith(("- met: ", "- **missed**: "))]
    assert len(lines) == len(goals) == 5
    for goal, line in zip(goals, lines, strict=True):
        assert goal["met"] is (goal["reached"] >= goal["limit"] if goal["at_least"] else goal["reached"] <= goal["limit"])
        assert (": " + goal["goal"] + ": " in line, line.startswith("- met")) == (True, goal["met"])


def test_clamp_is_a_full_svd_with_both_factors_cut_at_one_quantile():
    from bench.contestants import full_matrix

    weight = torch.randn(24, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    up, down = full_matrix(weight, 6, 0)
    U, S, Vh = torch.linalg.svd(weight.flatten(1))
    whole = torch.cat(((U[:, :6] * S[:6]).flatten(), Vh[:6].flatten()))
    bound, clamped = float(whole.quantile(0.99)), torch.cat((up.flatten(), down.flatten()))
    assert float(clamped.max()) == pytest.approx(bound, rel=1e-5)
    assert float(clamped.min()) == pytest.approx(-bound, rel=1e-5)
    inside = whole.abs() < bound
    torch.testing.assert_close(clamped[inside], whole[inside])


def test_memory_of_a_call_is_seen():
    from bench.measure import measure

    result, cost = measure(lambda: torch.ones(20_000_000), torch.device("cpu"))
    assert len(result) == 20_000_000
    assert cost.peak == pytest.approx(80e6, rel=0.1)
    assert cost.seconds > 0


def test_pairs_are_deleted_on_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import bench.__main__

    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.__main__, "prepare", interrupt)
    assert bench.__main__.main(["--small", "--arch", "sd1", "--folder", str(tmp_path)]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "cancelled" in capsys.readouterr().err


def test_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from bench.__main__ import main

    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 10**10, 10**10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["--folder", str(tmp_path / "new")]) == 2
    assert "needs 43.5 GB, 10.0 GB are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_kept_pairs_serve_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import bench.__main__

    seen = []

    def stop(pair: Any, *_: object) -> None:
        seen.append(pair.base.path.stat().st_mtime_ns)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.__main__, "prepare", stop)
    for _ in range(2):
        assert bench.__main__.main(["--small", "--arch", "sd1", "--folder", str(tmp_path), "--keep"]) == 130
    assert seen[0] == seen[1]


def test_a_command_is_set_beside_copying_and_run_beside_busy_processes(tmp_path: Path):
    from bench.table import tour_table  # with LyCORIS

    base, tuned = small_pair(tmp_path / "pair")
    stop = next(tour("sd1", base, tuned, 4, torch.device("cpu"), tmp_path, beside_others=True))
    assert stop.title == "`inspect`, the base"
    assert 0 < stop.copying < stop.seconds  # which starts Python
    assert stop.busy is not None
    line = tour_table([stop]).splitlines()[2].split("|")
    assert float(line[3]) == pytest.approx(stop.seconds / stop.copying, abs=0.06)
    assert float(line[4]) == pytest.approx(stop.busy / stop.seconds, abs=0.06)
    assert tour_table([replace(stop, busy=None)]).splitlines()[2].split("|")[4].strip() == ""


def test_busy_processes_are_busy_and_end():
    before = set(psutil.Process().children())
    with busy(2):
        others = set(psutil.Process().children()) - before
        time.sleep(1)
        assert len(others) == 2
        assert all(other.cpu_times().user > 0 for other in others)
    assert not any(other.is_running() for other in others)
