"""The folders of a WebUI with tiny files in them, and a session over a host without a WebUI."""

from __future__ import annotations

import shutil
from pathlib import Path

import tiny
import torch
from fake_host import FakeHost

from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.webui.session import Session

RANK_4 = ExtractSettings(RankPolicy(rank=4))


def make(folder: Path) -> Path:
    """base and other as checkpoints, the reference dpo-sd1 as a UNet alone, and a LoRA of SDXL."""
    tiny.save(folder / "Stable-diffusion" / "base.safetensors", tiny.base(), torch.float16)
    tiny.save(folder / "Stable-diffusion" / "other.safetensors", tiny.base(seed=5), torch.float16)
    tuned = tiny.in_diffusers("sd1", tiny.only_unet(tiny.tuned(rms=1e-3)))
    tiny.save(folder / "DPO" / "dpo-sd1" / "unet" / "diffusion_pytorch_model.safetensors", tuned)
    tiny.save(folder / "xl-base.safetensors", tiny.base("sdxl"), torch.float16)
    tiny.save(folder / "xl-tuned.safetensors", tiny.tuned("sdxl", rms=1e-3))
    pair = ("--base", folder / "xl-base.safetensors", "--tuned", folder / "xl-tuned.safetensors")
    assert tiny.run("extract", *pair, "-o", folder / "Lora" / "xl.safetensors", "--rank", 2) == 0
    return folder


def open_session(files: Path, folder: Path) -> Session:
    """A session of its own over a copy of the folders, base loaded."""
    shutil.copytree(files, folder)
    host = FakeHost(folder)
    host.live.load(host.checkpoint_dir / "base.safetensors")
    return Session(host)


def fake(session: Session) -> FakeHost:
    assert isinstance(session.host, FakeHost)
    return session.host


def extract(session: Session, name: str = "dpo", **options: object) -> object:
    arguments = {"base": "", "reference": "dpo-sd1", "name": name, "settings": RANK_4} | options
    return session.jobs.run(f"extract {name}", lambda job: session.extract(job, **arguments))  # type: ignore[arg-type]


def with_offsets(folder: Path) -> Path:
    """The same with the LoRA dpo of rank 4 and the offset file exact, both of base and dpo-sd1."""
    session = open_session(make(folder / "made"), folder / "models")
    extract(session)
    session.jobs.run("offset", lambda job: session.write_offset(job, base="", reference="dpo-sd1", name="exact"))
    return folder / "models"
