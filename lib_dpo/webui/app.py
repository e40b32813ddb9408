"""The tab without a WebUI: the same pages over the standalone host, with a list of checkpoints above them."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from lib_dpo.errors import BadFileError, OutputError, missing_extra
from lib_dpo.hosts.standalone import Standalone
from lib_dpo.settings import ASSETS, BUNDLED_BASE, BUNDLED_MODEL, BUNDLED_WORDS
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import clicks, markup

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PORTS = range(1, 65536)


def serve(*, models: Path | None, tokenizer: Path, device: str, address: str, port: int) -> None:
    """Open the first checkpoint and serve the tab until Ctrl-C.

    Args:
        models: folder with Stable-diffusion, Lora and DPO in it; None for one of our own, with the bundled model in it.

    Raises:
        MissingExtraError: gradio is not installed. OutputError: the port is taken or impossible.
        BadFileError: there is no checkpoint.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise missing_extra("the app needs", "gradio") from error
    check_port(address, port)
    folder = models or own_models()
    host = Standalone(folder, tokenizer, device=device, allow_paths=address in _LOOPBACK)
    entries = host.checkpoints()
    if not entries:
        raise BadFileError(f"{host.checkpoint_dir}: holds no checkpoint; put one there, or give another folder with --models")
    host.live.load(entries[0].path)
    blocks = build(Session(host))
    style, script = ASSETS / "style.css", ASSETS / "javascript" / "dpo.js"
    head = f"<style>{style.read_text(encoding='utf-8')}</style><script>{script.read_text(encoding='utf-8')}</script>"
    _ask_no_proxy(address)
    # gradio's own check gives the server 3 s to answer: a busy machine takes longer
    options = {"quiet": True, "prevent_thread_lock": True, "_frontend": False}
    try:
        blocks.launch(server_name=address, server_port=port, head=head, **options)
    except OSError as error:  # taken since we looked
        raise OutputError(f"port {port} cannot be used; choose another one with --port") from error
    print(f"serving {folder} on http://{address}:{port}; Ctrl-C ends it", flush=True)  # noqa: T201  # the command's own words
    blocks.block_thread()


def _ask_no_proxy(address: str) -> None:
    """Let gradio reach its own server where the environment names a proxy for everything (in this process alone)."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), address, *_LOOPBACK)))


def check_port(address: str, port: int) -> None:
    """Refuse a port that cannot be listened on, before anything is opened. Raises OutputError."""
    if port not in _PORTS:
        raise OutputError(f"port {port} does not exist; choose one from 1024 to 65535")
    try:
        _listen_once(address, port)
    except PermissionError as error:
        raise OutputError(f"port {port} is kept for the system; choose one from 1024 to 65535 with --port") from error
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise OutputError(f"{address} is no address of this machine; leave --host out") from error
        free = next((each for each in range(port + 1, min(port + 100, 65535)) if _is_free(address, each)), None)
        advice = f"such as --port {free}" if free else "with --port"
        raise OutputError(f"port {port} is used by another program; choose another one, {advice}") from error


def _listen_once(address: str, port: int) -> None:
    family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        if os.name != "nt":  # there it would share the port of another program
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that just ended does not count
        probe.bind(place)


def _is_free(address: str, port: int) -> bool:
    try:
        _listen_once(address, port)
    except OSError:
        return False
    return True


def own_models() -> Path:
    """A folder of models for this user, with a copy of the bundled one in it."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    folder = data / "sd-webui-dpo"
    for name, place in (("toy-shapes.safetensors", "Stable-diffusion"), ("toy-shapes.yaml", "Stable-diffusion"),
                        ("toy-shapes-dpo", "DPO")):  # fmt: skip
        source, target = BUNDLED_MODEL / name, folder / place / name
        if source.is_dir() and not target.exists():
            shutil.copytree(source, target)
        elif source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return folder


def load(session: Session, name: str) -> str:
    """Open another checkpoint of the list. Returns what the page says of it beside the status line."""
    host = session.host
    assert isinstance(host, Standalone), "the app runs on the standalone host"
    path = session.library.checkpoint(name)
    session.jobs.run(f"Load {name}", lambda job: host.live.load(path))
    return _words_of(host)


def _words_of(host: Standalone) -> str:
    """Which words the loaded model knows, where these are so few that one has to be told."""
    loaded = host.live.loaded()
    return markup.note(BUNDLED_WORDS) if loaded and loaded.path.name == BUNDLED_BASE else ""


def build(session: Session) -> Any:
    """The tab below a list of checkpoints, as gradio Blocks."""
    import gradio as gr

    from lib_dpo.webui import tab
    from lib_dpo.webui.tab import parts

    host = session.host
    assert isinstance(host, Standalone), "the app runs on the standalone host"

    with gr.Blocks(title="DPO offset", analytics_enabled=False) as page:
        with gr.Column(elem_id="dpo_app_top"), gr.Row():
            choice = gr.Dropdown(_names(host), value=_loaded_name(host), label="Checkpoint", scale=1)
            refresh = gr.Button("↻", elem_id="dpo_app_refresh", scale=0, min_width=48)
        answer = gr.HTML(_words_of(host))
        tab.build(session)
        parts.on(
            choice.input,
            clicks.guarded(session, lambda task, name: load(session, name), 1),
            [gr.State(""), choice],
            [answer, gr.State()],
        )
        for event in (refresh.click, choice.focus):  # a checkpoint may have been saved meanwhile
            parts.on(event, lambda: parts.update(choices=_names(host)), [], [choice], **parts.UNASKED)
        parts.on(page.load, lambda: parts.update(choices=_names(host), value=_loaded_name(host)), [], [choice], **parts.UNASKED)
    return page


def _names(host: Standalone) -> list[str]:
    return [entry.name for entry in host.checkpoints()]


def _loaded_name(host: Standalone) -> str | None:
    """The loaded checkpoint as the list names it."""
    loaded = host.live.loaded()
    return next((entry.name for entry in host.checkpoints() if loaded and entry.path == loaded.path), None)
