"""The tab over a host without a WebUI, for a browser: python serve_tab.py FOLDER, whose address is the line that it prints.

It runs in the environment whose gradio is to be seen. Style and script are put in by the browser's test, as WebUIs put them in.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fake_host import FakeHost

from lib_dpo.webui import tab
from lib_dpo.webui.session import Session


def main(folder: str) -> None:
    host = FakeHost(Path(folder))
    host.live.load(host.checkpoint_dir / "base.safetensors")
    blocks = tab.build(Session(host))
    blocks.queue()  # as WebUIs do
    _, address, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    print(f"serving {address}", flush=True)  # for the test that started it
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
