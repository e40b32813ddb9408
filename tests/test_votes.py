"""Votes: how they are kept and read again, what they say, when they have said enough, and which strength they like."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_dpo.errors import OutputError
from lib_dpo.pictures.votes import ballots
from lib_dpo.pictures.votes.ballots import Vote, add, file_for, read
from lib_dpo.pictures.votes.prompts import PROMPTS, shipped
from lib_dpo.pictures.votes.strengths import MIN_PROMPTS, best_strength, next_pair
from lib_dpo.pictures.votes.tally import Tally, log_e_value, tally, wilson

pytestmark = pytest.mark.newest  # depends on nothing that older sets have otherwise

VOTE = Vote("2026-01-02T03:04:05.678+00:00", "base", "dpo", "", 1.0, 0.0, "a cat", 7, "left", "a")
FIELDS = ["time", "model", "offset", "blocks", "a", "b", "prompt", "seed", "side", "answer"]

# ---- lines ----


def test_a_vote_is_one_line_with_the_ten_fields(tmp_path: Path):
    path = tmp_path / "votes" / "x.jsonl"
    add(path, VOTE)
    add(path, replace(VOTE, prompt="ein Bär,\n\u2028 zwei", seed=2**63 - 1, answer="none"))
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [list(json.loads(line)) for line in lines[:-1]] == [FIELDS, FIELDS]
    assert lines[-1] == ""
    found = read(path)
    assert found.problems == ()
    assert found.votes == (VOTE, replace(VOTE, prompt="ein Bär,\n\u2028 zwei", seed=2**63 - 1, answer="none"))


def test_the_time_is_utc_and_sorts():
    assert ballots.now() <= ballots.now()
    assert ballots.now().endswith("+00:00")


BAD = [
    (b'{"time": "20', "no whole line of JSON"),
    (b"\xff\xfe\x00", "no whole line of JSON"),
    (b"[1, 2]", "expected an object"),
    (b"[" * 100_000, "no whole line of JSON"),
    (VOTE.as_line().replace('"a": 1.0', '"a": NaN').encode(), "a is NaN, expected a number"),
    (VOTE.as_line().replace('"a": 1.0', '"a": true').encode(), "a is true, expected a number"),
    (VOTE.as_line().replace('"a": 1.0', '"a": 99').encode(), "expected a strength"),
    (VOTE.as_line().replace('"seed": 7', '"seed": 7.5').encode(), "expected a whole number"),
    (VOTE.as_line().replace('"seed": 7', '"seed": 1e400').encode(), "expected a whole number"),
    (VOTE.as_line().replace('"left"', '"top"').encode(), 'side is "top", expected left or right'),
    (VOTE.as_line().replace('"answer": "a"', '"answer": "left"').encode(), "expected a or b or none or skip"),
    (VOTE.as_line().replace('"answer": "a"', '"answer": ["a"]').encode(), "expected a or b or none or skip"),
    (VOTE.as_line().replace('"model": "base", ', "").encode(), "model is missing"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_a_bad_line_is_named_and_passed_over_and_stays(tmp_path: Path, line: bytes, words: str):
    path = tmp_path / "x.jsonl"
    good = VOTE.as_line().encode()
    path.write_bytes(good + b"\n" + line + b"\n\n" + good.replace(b'"seed": 7', b'"seed": 8') + b"\n")
    before = path.read_bytes()
    found = read(path)
    assert [vote.seed for vote in found.votes] == [7, 8]
    (problem,) = found.problems
    assert problem.startswith("x.jsonl, line 2: ")
    assert words in problem
    assert len(problem) < 250
    add(path, replace(VOTE, seed=9))
    assert path.read_bytes().startswith(before)
    assert len(read(path).votes) == 3


def test_what_a_killed_process_leaves_costs_its_own_vote_only(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    add(path, VOTE)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-20])
    add(path, replace(VOTE, seed=8))
    found = read(path)
    assert [vote.seed for vote in found.votes] == [7, 8]
    assert len(found.problems) == 1


def test_a_last_line_without_its_end_counts(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(VOTE.as_line().encode())
    assert read(path).votes == (VOTE,)
    add(path, replace(VOTE, seed=8))
    assert len(read(path).votes) == 2
    assert read(path).problems == ()


def test_processes_and_threads_append_whole_lines(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from lib_dpo.pictures.votes.ballots import add, parse\n"
        "vote = parse(sys.argv[2].encode())\n"
        "for n in range(40): add(Path(sys.argv[1]), replace(vote, seed=int(sys.argv[3]) + n))\n"
    )
    root = Path(__file__).parent.parent
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(path), VOTE.as_line(), str(1000 * n)], cwd=root) for n in range(2)
    ]
    threads = [threading.Thread(target=lambda n=n: add(path, replace(VOTE, seed=50_000 + n))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.wait(120) for run in runs] == [0, 0]
    assert len(read(path).votes) == 100
    assert read(path).problems == ()


def test_files_of_sessions_are_added_up_and_copies_count_once(tmp_path: Path):
    add(tmp_path / "one.jsonl", VOTE)
    add(tmp_path / "two.jsonl", replace(VOTE, time="2026-01-01T00:00:00.000+00:00", seed=1))
    (tmp_path / "copy of one.jsonl").write_bytes((tmp_path / "one.jsonl").read_bytes())
    (tmp_path / "notes.txt").write_text("no votes")
    found = read(tmp_path, tmp_path / "gone.jsonl")
    assert [vote.seed for vote in found.votes] == [1, 7]
    assert found.problems == ()
    assert found.of("base", "dpo", "") == found.votes
    assert found.of("base", "dpo", "MID=0") == ()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    add(tmp_path / "one.jsonl", VOTE)
    (tmp_path / "one.jsonl").chmod(0)
    assert "one.jsonl: cannot be read" in read(tmp_path).problems[0]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").mkdir()
    add(tmp_path / "b.jsonl", VOTE)
    found = read(tmp_path)
    assert found.votes == (VOTE,)
    assert "a.jsonl: cannot be read" in found.problems[0]


def test_a_vote_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "votes").write_text("a file")
    with pytest.raises(OutputError, match="is a file, expected the folder of votes"):
        add(tmp_path / "votes" / "x.jsonl", VOTE)
    assert (tmp_path / "votes").read_text() == "a file"


def test_names_of_files_are_plain(tmp_path: Path):
    assert file_for(tmp_path, "dream/shaper:8", "dpo..").name == "dream_shaper_8 - dpo.jsonl"
    assert file_for(tmp_path, "../..", "x" * 300).parent == tmp_path
    assert len(file_for(tmp_path, "é" * 300, "x" * 300).name) < 140


# ---- figures ----


def votes(wins: int, losses: int, ties: int = 0, skipped: int = 0) -> list[Vote]:
    """The untouched model is a in every other vote."""
    found = []
    for answer, count in (("win", wins), ("loss", losses), ("none", ties), ("skip", skipped)):
        for n in range(count):
            a, b = ((1.0, 0.0), (0.0, 1.0))[n % 2]
            given: Any = {"win": "ab"[n % 2], "loss": "ba"[n % 2]}.get(answer, answer)
            found.append(replace(VOTE, a=a, b=b, answer=given, seed=n))
    return found


def test_votes_are_counted_whichever_picture_is_a():
    found = tally(votes(5, 3, 2, 1))
    assert found == Tally(5, 3, 2, 1)
    assert found.win_rate == 5 / 8
    assert tally(votes(5, 3), strength=0.5) == Tally()
    assert tally([replace(VOTE, a=1.0, b=0.5)]) == Tally(), "no picture without the offset"
    below = [replace(VOTE, a=-1.0, b=0.0, answer="a")]
    assert tally(below) == Tally(), "of the opposite of DPO"
    assert tally(below, strength=-1.0) == Tally(wins=1, opposite=True)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(34, 45, 0.6133, 0.8577), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 148, 0.0624, 0.1605)],
)
def test_the_interval_is_wilsons(wins: int, n: int, low: float, high: float):
    """The last is of Newcombe (1998), table I; all are the roots of (w/n - p)² = z² p (1 - p) / n."""
    found = wilson(wins, n)
    assert found == pytest.approx((low, high), abs=6e-5)
    for p in found:
        if 0 < p < 1:
            assert (wins / n - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / n, rel=1e-9)


def exact_e_value(wins: int, losses: int) -> Fraction:
    """The same by what each vote was bet at: (wins so far + ½) / (votes so far + 1), of Krichevsky and Trofimov (1981)."""
    product = Fraction(1)
    for n in range(wins):
        product *= 2 * (n + Fraction(1, 2)) / (n + 1)
    for n in range(losses):
        product *= 2 * (n + Fraction(1, 2)) / (wins + n + 1)
    return product


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_e_value_is_the_product_of_its_bets(wins: int, losses: int):
    assert log_e_value(wins, losses) == pytest.approx(math.log(exact_e_value(wins, losses)), abs=1e-9)


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_e_value_is_a_fair_game(wins: int, losses: int):
    after = math.exp(log_e_value(wins + 1, losses)) + math.exp(log_e_value(wins, losses + 1))
    assert after / 2 == pytest.approx(math.exp(log_e_value(wins, losses)), rel=1e-9)


def test_the_e_value_of_thousands_of_votes_is_a_number():
    assert math.isfinite(Tally(wins=5000).e_value)
    json.dumps(Tally(wins=5000).as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (Tally(), "open", "No votes yet."),
        (Tally(ties=3), "open", "no vote prefers a picture. In 3 of all 3 votes no difference was seen."),
        (Tally(34, 11, 5), "better", "DPO wins 34 of 45 on your model: real. Win rate 76 % (95 % interval 61 to 86 %). In 5"),
        (Tally(11, 34), "worse", "DPO loses 34 of 45 on your model: real."),
        (Tally(7, 3), "open", "Not decided yet: DPO wins 7 of 10."),
        (Tally(20, 0, opposite=True), "better", "The opposite of DPO wins 20 of 20 on your model: real."),
        (Tally(7, 3, opposite=True), "open", "Not decided yet: the opposite of DPO wins 7 of 10."),
        (Tally(48, 48), "no difference", "No difference after 96 votes that matters: at most 10 points from one half."),
    ],
)
def test_figures_in_words(found: Tally, verdict: str, words: str):
    assert found.verdict == verdict
    assert words in found.text


def ends(rate: float, tests: int, most: int, seed: int = 1) -> tuple[dict[str, float], float]:
    """Simulated tests, looked at after every vote: the share of each end, and the median number of votes."""
    counts, used = dict.fromkeys(("better", "worse", "no difference", "open"), 0), []
    for row in np.random.default_rng(seed).random((tests, most)) < rate:
        wins, end = 0, "open"
        for n, won in enumerate(row, 1):
            wins += int(won)
            end = Tally(wins, n - wins).verdict
            if end != "open":
                break
        counts[end] += 1
        used.append(n)
    return {name: count / tests for name, count in counts.items()}, float(np.median(used))


def test_whoever_looks_after_every_vote_is_wrong_in_5_of_100_tests_at_most():
    """The e-value alone, without the other end: the bound of Ville holds for as long as one likes."""
    coins = np.random.default_rng(2).random((1500, 1000)) < 0.5
    wins, n = coins.cumsum(1), np.arange(1, 1001)
    enough = [next((w for w in range(total // 2, total + 1) if log_e_value(w, total - w) >= math.log(20)), 9999) for total in n]
    wrong = (np.maximum(wins, n - wins) >= np.array(enough)).any(1).mean()
    assert 0.01 < wrong < 0.05
    shares, _ = ends(0.5, 200, 400)
    assert shares["better"] + shares["worse"] < 0.08
    assert shares["no difference"] > 0.9


@pytest.mark.parametrize(("rate", "median", "missed"), [(0.8, 19, 0.0), (0.7, 47, 0.01), (0.65, 92, 0.03)])
def test_how_many_votes_it_takes(rate: float, median: float, missed: float):
    shares, votes_needed = ends(rate, 300, 600)
    assert votes_needed == pytest.approx(median, rel=0.15)
    assert shares["better"] >= 1 - missed - 0.01
    assert shares["worse"] == 0


def test_a_difference_beyond_the_margin_is_rarely_called_none():
    shares, _ = ends(0.65, 300, 600)
    assert shares["no difference"] <= 0.02
    on_the_edge, _ = ends(0.6, 300, 1000)
    assert on_the_edge["no difference"] < 0.2


# ---- which strength ----

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def voter(liking: Any, rng: np.random.Generator, count: int, *, adaptive: bool = True, prompts: int = 60) -> list[Vote]:
    """Somebody whose liking of a strength varies with the prompt; asked for the pair that tells most, or for any."""
    names = shipped()[:prompts]
    own = {name: rng.normal(0, 0.7, 2) for name in names}
    given: list[Vote] = []
    for n in range(count):
        name = names[n % len(names)]
        any_two = sorted(rng.choice(len(STRENGTHS), 2, replace=False))[::-1]
        a, b = next_pair(given, STRENGTHS) if adaptive else (STRENGTHS[any_two[0]], STRENGTHS[any_two[1]])
        odds = liking(a) - liking(b) + own[name] @ (np.array([a, a * a / 3]) - np.array([b, b * b / 3])) / 3
        given.append(
            replace(VOTE, a=a, b=b, prompt=name, seed=n, answer="a" if rng.random() < 1 / (1 + np.exp(-odds)) else "b")
        )
    return given


def hill(strength: float) -> float:
    """Best at 1.5."""
    return 1.5 * (2 * strength / 1.5 - (strength / 1.5) ** 2)


def test_the_best_strength_of_simulated_voters_is_found():
    found = [best_strength(voter(hill, np.random.default_rng(seed), 100)) for seed in range(24)]
    errors = [abs(each.best - 1.5) for each in found if each]
    held = [each.interval[0] <= 1.5 <= each.interval[1] for each in found if each and each.interval]
    assert len(held) == 24
    assert np.median(errors) < 0.15
    assert np.mean(held) > 0.8


def test_votes_that_tell_nothing_find_no_best_strength():
    same = [replace(VOTE, a=a, b=0.0, prompt=f"{n}", answer="none") for a in (-1.0, 1.0) for n in range(20)]
    found = best_strength(same)
    assert found is not None
    assert (found.best, found.interval) == (0.0, None)
    assert found.text == "No strength is preferred to another so far, in 40 votes."


def test_few_votes_that_all_agree_leave_much_open():
    found = best_strength([replace(VOTE, a=2.0, b=0.0, prompt=f"{n}", answer="a") for n in range(8)])
    assert found is not None
    assert found.interval is not None
    low, high = found.interval
    assert low < 1.5
    assert high == found.best == 2.0
    assert "It is the largest that was tried: one beyond it may be better." in found.text
    opposite = best_strength([replace(VOTE, a=-2.0, b=0.0, prompt=f"{n}", answer="a") for n in range(8)])
    assert opposite is not None
    assert "It is the smallest that was tried" in opposite.text


def test_pairs_that_tell_most_tell_more_than_any_pairs():
    def error(adaptive: bool) -> float:
        found = [best_strength(voter(hill, np.random.default_rng(n), 30, adaptive=adaptive)) for n in range(24)]
        return float(np.mean([abs(each.best - 1.5) for each in found if each]))

    assert error(True) < 0.8 * error(False)


@pytest.mark.parametrize(("liking", "best"), [(lambda s: 0.7 * s, 3.0), (lambda s: -0.7 * s, 0.0)])
def test_a_best_strength_at_an_end_is_that_end(liking: Any, best: float):
    found = best_strength(voter(liking, np.random.default_rng(0), 120))
    assert found is not None
    assert found.best == best
    assert found.interval is not None
    assert found.interval[0] <= best <= found.interval[1]


def test_the_curve_is_the_maximum_of_its_likelihood():
    """β by hand: the gradient of the penalised likelihood, from the votes one by one, vanishes."""
    given = [*voter(hill, np.random.default_rng(3), 40), replace(VOTE, a=0.5, b=2.0, answer="none")]
    found = best_strength(given)
    assert found is not None
    u = np.array(found.strengths) / 3
    beta = np.linalg.lstsq(np.stack([u, u**2], 1), np.array(found.liking), rcond=None)[0]
    gradient = -beta / 16
    for vote in given:
        x = np.array([vote.a - vote.b, (vote.a**2 - vote.b**2) / 3]) / 3
        y = {"a": 1.0, "b": 0.0, "none": 0.5}[vote.answer]
        gradient = gradient + (y - 1 / (1 + np.exp(-x @ beta))) * x
    assert np.abs(gradient).max() < 1e-6
    assert found.liking[0] == 0, "the untouched model"


def test_the_same_votes_give_the_same_interval_and_copies_of_prompts_narrow_nothing():
    given = voter(hill, np.random.default_rng(5), 60)
    assert best_strength(given) == best_strength(given)
    few = [replace(vote, prompt=f"prompt {n % (MIN_PROMPTS - 1)}") for n, vote in enumerate(given)]
    found = best_strength(few)
    assert found is not None
    assert found.interval is None
    assert f"needs votes on {MIN_PROMPTS} prompts" in found.text


def test_no_votes_no_curve():
    assert best_strength([]) is None
    assert best_strength([replace(VOTE, answer="skip"), replace(VOTE, a=1.0, b=1.0)]) is None


def test_pairs_that_are_asked_already_are_counted_in():
    first = next_pair([], STRENGTHS)
    assert first[0] > first[1]
    others = [next_pair([], STRENGTHS, [first] * n) for n in range(1, 12)]
    assert set(others) - {first}
    assert next_pair([], (0.0, 1.0), [(1.0, 0.0)] * 5) == (1.0, 0.0)


# ---- prompts ----


def test_the_prompts_are_ten_of_each_kind_and_all_different():
    assert list(PROMPTS) == ["counting", "colours", "relations", "hands and faces", "long sentences", "styles"]
    assert {len(prompts) for prompts in PROMPTS.values()} == {10}
    assert len({prompt.casefold() for prompt in shipped()}) == 60
    assert shipped(("colours",)) == PROMPTS["colours"]
    assert [prompt in PROMPTS[name] for prompt, name in zip(shipped(), PROMPTS, strict=False)] == [True] * 6
    assert all(len(prompt.split()) <= 13 for name in PROMPTS for prompt in PROMPTS[name] if name != "long sentences")
    assert all(len(prompt.split()) >= 17 for prompt in PROMPTS["long sentences"])


# ---- the bundled model, with its judge as the voter ----

JUDGED = json.loads((Path(__file__).parent / "judged.json").read_text(encoding="utf-8"))
PLATEAU = (1.0, 2.75)  # what a study of 500 pictures a strength could not tell from the best


def judge_votes(count: int, order: Any) -> list[Vote]:
    """The judge prefers the picture that shows more of its prompt; asked for the pairs that tell most."""
    from lib_dpo.toy.pictures import caption
    from lib_dpo.toy.series import subjects

    strengths = [strength for strength in JUDGED["strengths"] if strength <= 3.5]
    right = dict(zip(JUDGED["strengths"], JUDGED["right"], strict=True))
    pictures, given = subjects(len(JUDGED["right"][0])), []
    for n in order[:count]:
        scene, seed = pictures[n]
        a, b = next_pair(given, strengths)
        more = int(right[a][n]) - int(right[b][n])
        answer: Any = "a" if more > 0 else "b" if more < 0 else "none"
        given.append(replace(VOTE, a=a, b=b, prompt=caption(scene), seed=seed, answer=answer))
    return given


@pytest.mark.parametrize("seed", range(5))
def test_with_the_judge_as_the_voter_the_plateau_of_the_study_is_found(seed: int):
    found = best_strength(judge_votes(400, np.random.default_rng(seed).permutation(400)))
    assert found is not None
    assert found.interval is not None
    assert PLATEAU[0] <= found.best <= PLATEAU[1]
    assert found.interval[0] > 0.5, "surely more than none of it"
    assert found.interval[1] < PLATEAU[1], "surely less than too much"
    assert found.preferred(3.5) < 0.5 < found.preferred(found.best)


@pytest.mark.slow
@pytest.mark.newest
def test_the_judge_still_sees_what_was_recorded(tmp_path: Path):
    """A few pictures drawn anew; rounding on another machine may turn one of them."""
    pytest.importorskip("diffusers")
    import lib_dpo
    from lib_dpo.offsets.lora.offset import open_offset
    from lib_dpo.toy import bundled
    from lib_dpo.toy.judge import adherence
    from lib_dpo.toy.series import subjects

    lib_dpo.write_offset(bundled.FOLDER / bundled.BASE, bundled.FOLDER / bundled.REFERENCE, tmp_path / "offset.safetensors")
    networks, pictures = bundled.load(), subjects(400)[:12]
    with open_offset(tmp_path / "offset.safetensors") as offset:
        for strength in (0.0, 2.0):
            networks.set_unet(offset, strength)
            drawn = bundled.generate(networks, [scene for scene, _ in pictures], [seed for _, seed in pictures])
            seen = np.rint(4 * adherence(drawn, [scene for scene, _ in pictures])[:, 0]).astype(int)
            recorded = JUDGED["right"][JUDGED["strengths"].index(strength)][: len(pictures)]
            assert sum(int(digit) == value for digit, value in zip(recorded, seen, strict=True)) >= len(pictures) - 1
