"""A WebUI as a process: started on a free loopback port over folders of the test's own, asked by HTTP, stopped by its id.

The WebUI's own folder is not altered: models, extensions, settings and outputs lie in the data folder (--data-dir), in
which the extension is a link.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from flavours import Flavour

REPOSITORY = Path(__file__).resolve().parent.parent
PROBE = Path(__file__).resolve().parent / "probe"
READY = "Startup time:"  # the last line of a start; routes and script arguments may be missing until then
_UP_S, _STOP_S, _ANSWER_S = 300, 15, 900
_OURS = ("lib_dpo", "scripts/dpo.py")


class Server:
    """One WebUI over one data folder; `ensure` starts or restarts it."""

    def __init__(self, webui: Path, python: Path, flavour: Flavour) -> None:
        self.flavour = flavour
        self._webui, self._python = webui, python
        self._process: subprocess.Popen[bytes] | None = None
        self._running: tuple[object, ...] = ()
        self._http = httpx.Client()
        self.data = Path()
        self.log_path = Path()
        self.url = ""
        self.known: dict[str, Any] = {}  # what tests remember of this process

    # ---- life ----

    def ensure(
        self, data: Path, *flags: str, auth: tuple[str, str] | None = None, links: Sequence[Path] = (REPOSITORY,)
    ) -> None:
        """Run over this data folder with these flags and extensions; what runs so already goes on.

        Args:
            auth: user and password that requests carry.
        """
        wanted = (data, flags, auth, tuple(links))
        if self._process and self._process.poll() is None and self._running == wanted:
            return
        self.stop()
        self.data, self._running, self.known = data, wanted, {}
        _link(data / "extensions", links)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = data / f"server-{port}.log"
        # A connection of its own for each request: after an error in a request, Forge's web server hangs up.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(base_url=self.url, timeout=_ANSWER_S, auth=auth, trust_env=False, limits=limits)
        places = ["--data-dir", str(data), "--gradio-allowed-path", str(self._webui)]  # Forge: else none of its own scripts
        command = [str(self._python), "launch.py", *self.flavour.flags, "--port", str(port), *places, *flags]
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self._webui, env=_environment(data), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._wait(1, _UP_S)

    def wait_for_start(self, number: int) -> None:
        """Until it has started this many times: Reload UI starts it again in the same process."""
        self._wait(number, _UP_S)

    def starts(self) -> int:
        """How often the page was built since the process began."""
        return self.log().count(READY)

    def stop(self) -> None:
        """End the process as Ctrl-C does, else by force, and take the links away."""
        process, self._process = self._process, None
        self._http.close()
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        _link(self.data / "extensions", ())

    def _wait(self, number: int, seconds: float) -> None:
        assert self._process is not None, "not started"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"the WebUI ended with {self._process.returncode}:\n{self.log()[-3000:]}")
            if self.starts() >= number and self._answers():
                return
            time.sleep(0.2)
        raise RuntimeError(f"the WebUI is not up after {seconds} s:\n{self.log()[-3000:]}")

    def _answers(self) -> bool:
        try:
            return self._http.get("/openapi.json").status_code in (200, 401)
        except httpx.HTTPError:
            return False

    # ---- talking ----

    def ask(self, method: str, path: str, json: Any = None, **options: Any) -> httpx.Response:
        """Any request; the response, whatever its status. Paths without a slash are those of our API."""
        return self._http.request(method, path if path.startswith("/") else f"/dpo/v1/{path}", json=json, **options)

    def get(self, path: str, **params: Any) -> Any:
        return _json(self.ask("GET", path, params=params))

    def post(self, path: str, **body: Any) -> Any:
        return _json(self.ask("POST", path, body))

    def do(self, path: str, **body: Any) -> Any:
        """The result of one of our jobs."""
        return self.post(path, **body)["result"]

    # ---- its log ----

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def tracebacks(self) -> list[str]:
        """The tracebacks in the log that come from our code."""
        return [block for block in _tracebacks(self.log()) if any(mark in block for mark in _OURS)]

    def rss(self) -> int:
        """Bytes of main memory that the process holds."""
        assert self._process is not None, "not started"
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0


@contextmanager
def running(webui: Path, python: Path, flavour: Flavour) -> Iterator[Server]:
    """A server that is stopped at the end, whatever happened."""
    server = Server(webui, python, flavour)
    try:
        yield server
    finally:
        server.stop()


def _link(folder: Path, targets: Sequence[Path]) -> None:
    """Make the links in the folder be these."""
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.iterdir():
        if link.is_symlink():
            link.unlink()
    for target in targets:
        name = "sd-webui-dpo" if target == REPOSITORY else f"a-{target.name}"  # extensions load in the order of their names
        (folder / name).symlink_to(target, target_is_directory=True)


def _environment(data: Path) -> dict[str, str]:
    ours = {
        "HF_HOME": str(data / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "agg",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": os.environ.get("WEBUI_THREADS", str(min(4, os.cpu_count() or 1))),
    }
    left_out = ("COMMANDLINE_ARGS", "PYTHONPATH", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in left_out} | ours


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _json(response: httpx.Response) -> Any:
    assert response.is_success, (
        f"{response.request.method} {response.request.url}: {response.status_code} {response.text[:2000]}"
    )
    return response.json()


def _tracebacks(log: str) -> Iterator[str]:
    """Blocks of indented lines below `Traceback`, with the line that names the error."""
    lines = log.splitlines()
    for start, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            indent = len(line) - len(line.lstrip(" *"))
            end = start + 1
            while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
                end += 1
            yield "\n".join(lines[start : end + 1])
