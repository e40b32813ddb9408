"""The API over the standalone host, in a process of its own: python serve_api.py MODELS prints its address in a line."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import uvicorn
from fastapi import FastAPI

from lib_dpo.hosts.standalone import Standalone
from lib_dpo.webui.api import add_routes
from lib_dpo.webui.session import Session


def main(models: Path) -> None:
    host = Standalone(models, models / "tokenizer", device="cpu")
    host.live.load(host.checkpoint_dir / "base.safetensors")
    app = FastAPI()
    add_routes(app, Session(host))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        print(f"serving http://127.0.0.1:{listening.getsockname()[1]}", flush=True)  # for the test that started it
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
