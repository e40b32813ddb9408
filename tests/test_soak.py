"""Hundreds of random steps in one process: bake, strength, LoRA, pictures, undo, another checkpoint, on the standalone host.

After each step the weights are what the steps before say; at the end they are the file's own, bit for bit, and memory is no
more than it was. `make soak` takes 500 steps; the same on a real WebUI is tests_webui/test_soak.py.
"""

from __future__ import annotations

import os
import random
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from fakes_standalone import tokenizer

from lib_dpo.families.blocks import parse_blocks
from lib_dpo.hosts.base import Request
from lib_dpo.hosts.standalone import Standalone
from lib_dpo.offsets.patch import Patch, open_patch
from lib_dpo.webui.session import Session

pytestmark = [
    pytest.mark.newest,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers with numpy 2
]
psutil = pytest.importorskip("psutil")
STEPS = int(os.environ.get("DPO_SOAK", "30"))
SEED = int(os.environ.get("DPO_SOAK_SEED", "0"))
GROWTH = 48 << 20  # bytes; 500 steps have about 90 bakes between the quarters compared: what each left of its 2.4 MB would show
CHECKPOINTS, OFFSETS, BLOCKS = ("base", "other"), ("dpo", "strong", "dense"), ("", "IN=0.5,MID=0", "OUT=-1")
Baked = tuple[str, float, str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = tiny.save(folder / "Stable-diffusion" / "base.safetensors", tiny.base(), torch.float16)
    tiny.save(folder / "Stable-diffusion" / "other.safetensors", tiny.base(seed=5), torch.float16)
    tuned, strong = (tiny.save(folder / f"{rms}.safetensors", tiny.tuned(rms=rms)) for rms in (1e-3, 3e-2))
    lora, dense = folder / "Lora", folder / "DPO"
    for name, pair in (("dpo", tuned), ("strong", strong)):
        of = ("--base", base, "--tuned", pair, "-o", lora / f"{name}.safetensors")
        assert tiny.run("extract", *of, "--rank", 8) == 0
    assert tiny.run("offset", "--base", base, "--tuned", tuned, "-o", dense / "dense.safetensors") == 0
    tokenizer(folder / "tokenizer")
    return folder


@dataclass
class Soak:
    """One host, and what its weights must be."""

    models: Path
    host: Standalone
    session: Session
    made: random.Random
    checkpoint: str = "base"
    baked: Baked | None = None

    def step(self) -> str:
        """One random step; what it was."""
        steps = (self.bake, self.bake, self.another_strength, self.undo, self.undo, self.switch, self.draw, self.refused)
        return self.made.choice(steps)()

    def bake(self) -> str:
        return self._bake((self.made.choice(OFFSETS), round(self.made.uniform(-1, 2), 2) or 1.0, self.made.choice(BLOCKS)))

    def another_strength(self) -> str:
        offset, _, blocks = self.baked or ("dpo", 1.0, "")
        return self._bake((offset, round(self.made.uniform(0.1, 2), 2), blocks))

    def _bake(self, wanted: Baked) -> str:
        offset, strength, blocks = wanted
        self.session.jobs.run("bake", lambda job: self.session.bake(job, offset=offset, strength=strength, blocks=blocks))
        self.baked = wanted
        return f"bake {wanted}"

    def undo(self) -> str:
        undone = self.session.jobs.run("unbake", self.session.unbake)
        assert undone is (self.baked is not None)
        self.baked = None
        return "undo"

    def switch(self) -> str:
        self.checkpoint, self.baked = self.made.choice(CHECKPOINTS), None
        path = self.host.checkpoint_dir / f"{self.checkpoint}.safetensors"
        self.session.jobs.run("load", lambda job: self.host.live.load(path))
        return f"switch to {self.checkpoint}"

    def draw(self) -> str:
        """A picture with an offset of its own on top of whatever is baked; the next step takes it out again."""
        patch = self.session.patch(self.made.choice(OFFSETS))
        request = Request("a b", seed=self.made.randrange(9), steps=1, width=32, height=32)
        self.session.jobs.run("draw", lambda job: self.host.generate(request, patch, self.made.choice((0.5, 1.0))))
        self.host.live.apply(None, 0)
        return f"draw with {patch.name}"

    def refused(self) -> str:
        with pytest.raises(Exception, match="strength"):
            self.session.jobs.run("bake", lambda job: self.session.bake(job, offset="dpo", strength=1e9))
        return "a bake that is refused"

    def check(self) -> None:
        """Bit for bit the file's where nothing is baked; else all of it within a rounding of the sum in float64."""
        clean, found = _of_file(self.checkpoint), self._weights()
        told = self.session.status().baked
        assert (told and (told.strength, told.offset)) == (self.baked and (self.baked[1], self.baked[0]))
        with closing(self._patch()) as patch:
            changed = set(patch.changed_keys()) if self.baked else set()
            for key, tensor in found.items():
                if key not in changed:
                    assert torch.equal(tensor, clean[key].reshape(tensor.shape)), key
            for key in self.made.sample(sorted(changed), min(40, len(changed))):
                assert self.baked
                before = clean[key].double().reshape(found[key].shape)
                change = self.baked[1] * patch.weight(key) * patch.offset.read(key, torch.float64).reshape(before.shape)
                error = (found[key].double() - before - change).abs()
                assert float(error.max()) <= float(before.abs().max() + change.abs().max()) * 2**-22, key  # of float32 sums

    def _patch(self) -> Patch:
        name, _, blocks = self.baked or ("dpo", 1.0, "")
        folder = "DPO" if name == "dense" else "Lora"
        return open_patch(self.models / folder / f"{name}.safetensors", blocks=parse_blocks(blocks))

    def _weights(self) -> dict[str, torch.Tensor]:
        weights = self.host.live._weights
        assert weights is not None
        return dict(weights.tensors)


def _of_file(name: str) -> dict[str, torch.Tensor]:
    return tiny.base(seed=5 if name == "other" else 0)


def test_random_steps_leave_the_weights_and_the_memory_as_they_were(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = Standalone(models, models / "tokenizer", device="cpu")
    host.live.load(host.checkpoint_dir / "base.safetensors")
    soak, steps, held = Soak(models, host, Session(host), random.Random(SEED)), [], []
    for _ in range(STEPS):
        steps.append(soak.step())
        try:
            soak.check()
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, after {len(steps)} steps, the last of them {steps[-6:]}: {error}") from error
        held.append(psutil.Process().memory_info().rss)
    soak.undo()
    soak.check()
    quarter = len(held) // 4
    second, last = (sum(part) / len(part) for part in (held[quarter : 2 * quarter], held[-quarter:]))
    with capsys.disabled():
        print(f"\n{STEPS} steps, seed {SEED}: {second / 2**20:.0f} MiB in the second quarter, {last / 2**20:.0f} in the last")
    assert last - second < GROWTH, f"memory grew by {(last - second) / 2**20:.0f} MiB: {steps}"
