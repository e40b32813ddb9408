"""scripts/*.py executed as the hosts do it, twice: a module that is in no list, named after its file; and install.py."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lib_dpo.errors import Cancelled, HostError
from lib_dpo.hosts import picture_folder
from lib_dpo.hosts.base import Picture, Request
from lib_dpo.webui.session import Session

ROOT = Path(__file__).resolve().parent.parent
CALLBACKS = ("on_before_ui", "on_ui_settings", "on_ui_tabs", "on_app_started", "on_model_loaded")


class Strict(ModuleType):
    """A module of the host's: a name that nobody gave it raises AttributeError."""

    def __init__(self, name: str, **names: Any) -> None:
        super().__init__(name)
        vars(self).update(names)


class Script:
    """The host's base class, as far as it is used."""

    infotext_fields: Any = None
    paste_field_names: Any = None

    def elem_id(self, item: str) -> str:
        return f"script_{item}"


class OptionInfo:
    def __init__(self, default: Any, label: str, *, section: tuple[str, str]) -> None:
        self.default, self.label, self.section = default, label, section

    def info(self, text: str) -> OptionInfo:
        return self


class AxisOption:
    def __init__(self, label, type, apply, format_value=None, confirm=None, cost=0.0, choices=None, prepare=None):
        self.label = label


class State:
    """The host's progress bar."""

    def begin(self, job: str) -> None:
        self.interrupted = self.skipped = self.stopping_generation = False

    def end(self) -> None:
        pass


class Host:
    """A host's registries, filled by what a script registers."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[..., Any]]] = defaultdict(list)
        self.options: dict[str, OptionInfo] = {}
        self.xyz = Strict("xyz_grid.py", AxisOption=AxisOption, axis_options=[])
        self.modules = self._modules()

    def reload_ui(self) -> None:
        """What Reload UI does: callbacks cleared, the X/Y/Z script a new module."""
        self.callbacks.clear()
        self.xyz.axis_options.clear()

    def load(self, path: Path) -> ModuleType:
        """Execute a script as modules/script_loading.py does: not in sys.modules, named with its suffix."""
        spec = importlib.util.spec_from_file_location(path.name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _modules(self) -> dict[str, ModuleType]:
        def register(name: str) -> Callable[[Callable[..., Any]], None]:
            return lambda callback: self.callbacks[name].append(callback)

        @contextlib.contextmanager
        def accordion(value: bool, *, label: str, elem_id: str) -> Iterator[Any]:
            import gradio as gr

            checkbox = gr.Checkbox(value=value, label=label, elem_id=elem_id)
            with gr.Accordion(label=label):
                yield checkbox

        scripts_data = [SimpleNamespace(path="/webui/scripts/xyz_grid.py", module=self.xyz)]
        opts = SimpleNamespace(add_option=self.options.__setitem__, restricted_opts={"outdir_samples"})
        children = {
            "script_callbacks": Strict("script_callbacks", **{name: register(name) for name in CALLBACKS}),
            "scripts": Strict("scripts", Script=Script, AlwaysVisible=object(), scripts_data=scripts_data),
            "shared": Strict(
                "shared",
                OptionInfo=OptionInfo,
                opts=opts,
                cmd_opts=SimpleNamespace(api=True),
                state=State(),
                total_tqdm=SimpleNamespace(clear=lambda: None),
            ),
            "ui_components": Strict("ui_components", InputAccordion=accordion),
            "call_queue": Strict("call_queue", queue_lock=threading.Lock()),
            "paths": Strict("paths", models_path="/webui/models", data_path="/webui"),
            "processing": Strict("processing", program_version=lambda: "v1.10.1"),
            "progress": Strict(
                "progress",
                pending_tasks={},
                create_task_id=lambda kind: f"task({kind})",
                add_task_to_queue=lambda task: None,
                start_task=lambda task: None,
                finish_task=lambda task: None,
            ),
            "sd_models": Strict("sd_models", model_path="/webui/models/Stable-diffusion", checkpoints_list={}),
            "sd_samplers": Strict("sd_samplers", samplers=[]),
        }
        return {"modules": Strict("modules", __path__=[], **children)} | {
            f"modules.{name}": module for name, module in children.items()
        }


@pytest.fixture
def session(tmp_path: Path) -> Session:
    from fake_host import FakeHost

    return Session(FakeHost(tmp_path))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, session: Session) -> Iterator[Host]:
    host = Host()
    for name, module in host.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lib_dpo.hosts.detect.current_host", lambda: session.host)
    monkeypatch.delitem(sys.modules, "lib_dpo.hosts.a1111_family", raising=False)
    yield host
    sys.modules.pop("lib_dpo.hosts.a1111_family", None)  # it holds the fakes


def files() -> list[Path]:
    return sorted((ROOT / "scripts").glob("*.py"))


def test_every_script_registers_once_on_every_load(host: Host):
    for _ in range(2):
        host.reload_ui()
        for file in files():
            host.load(file)
        assert {name: len(found) for name, found in host.callbacks.items()} == dict.fromkeys(CALLBACKS, 1)
        labels = [option.label for option in host.xyz.axis_options]
        assert labels == [f"[DPO] {name}" for name in ("Strength", "Offset", "Rank", "Blocks", "Method")]
        host.callbacks["on_before_ui"][0]()
        assert len(host.xyz.axis_options) == len(labels)


def test_scripts_are_thin_and_register_one_script_class(host: Host):
    for file in files():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 100
        module = host.load(file)
        classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Script)]
        assert len(classes) == 1  # the host registers every one it finds, the base class too


def test_the_tab_the_settings_and_the_routes(host: Host):
    from fastapi import FastAPI

    host.load(files()[0])
    ((blocks, title, name),) = host.callbacks["on_ui_tabs"][0]()
    assert (title, name) == ("DPO", "dpo")
    assert blocks is not None
    host.callbacks["on_ui_settings"][0]()
    assert set(host.options) == {"dpo_reference_dir", "dpo_allow_paths"}
    assert host.options["dpo_allow_paths"].default is False
    assert host.modules["modules.shared"].opts.restricted_opts >= {"dpo_reference_dir", "dpo_allow_paths"}
    app = FastAPI()
    host.callbacks["on_app_started"][0](None, app)
    assert any(getattr(route, "path", "") == "/dpo/v1/status" for route in app.routes)
    closed = FastAPI()
    host.modules["modules.shared"].cmd_opts.api = False
    host.callbacks["on_app_started"][0](object(), closed)
    assert not any(getattr(route, "path", "").startswith("/dpo") for route in closed.routes)
    host.callbacks["on_model_loaded"][0](object())


def test_send_to_carries_every_control_to_its_own_in_the_other_tab(host: Host):
    import gradio as gr

    def carried(names: list[Any], fields: list[tuple[Any, Any]]) -> list[str]:
        """As the hosts choose, in connect_paste_params_buttons of modules/infotext_utils.py: the two lists are zipped there."""
        return [field.label for field, name in fields if name in names]

    tabs = []
    for is_img2img in (False, True):
        script = host.load(files()[0]).DpoOffset() if not tabs else type(tabs[0])()
        with gr.Blocks():
            components = script.ui(is_img2img)
        assert [field for field, _ in script.infotext_fields] == components
        tabs.append(script)
    names = tabs[0].paste_field_names
    labels = [field.label for field, _ in tabs[0].infotext_fields]
    assert len(labels) == 5
    assert carried(names, tabs[0].infotext_fields) == carried(names, tabs[1].infotext_fields) == labels
    assert carried(["Prompt", "Steps"], tabs[0].infotext_fields) == []


def test_the_script_has_five_arguments_and_restores_itself_from_infotexts(host: Host, session: Session):
    import gradio as gr

    script = host.load(files()[0]).DpoOffset()
    assert script.title() == "DPO offset"
    assert script.show(False) is host.modules["modules.scripts"].AlwaysVisible
    for _ in range(2):  # the API calls it again in a throw-away Blocks
        with gr.Blocks():
            components = script.ui(False)
    assert [type(each).__name__ for each in components] == ["Checkbox", "Dropdown", "Slider", "Textbox", "Number"]
    assert [each.value for each in components] == [False, "None", 1.0, "", 0]
    fields = dict(
        zip(("enabled", "offset", "strength", "blocks", "rank"), [target for _, target in script.infotext_fields], strict=True)
    )
    pasted = {"DPO offset": "dpo", "DPO strength": "0.5"}
    assert fields["enabled"](pasted) is True
    assert fields["enabled"]({"Steps": "20"}) is False  # a picture without our keys switches the script off
    assert (fields["offset"], fields["strength"]) == ("DPO offset", "DPO strength")
    assert fields["blocks"](pasted) == ""
    assert fields["blocks"]({"Steps": "20"}) is None
    assert [fields["rank"](found) for found in (pasted, pasted | {"DPO rank": "8"}, {"Steps": "20"})] == [0, 8, None]
    p = SimpleNamespace(extra_generation_params={}, calls=[])
    script.process(p, False, "None", 1.0, "")
    script.after_extra_networks_activate(p, batch_number=0, extra_network_data={})
    script.process_batch(p, batch_number=0)
    script.process_before_every_sampling(p, x=None)
    assert [call[:2] for call in p.calls] == [("networks", None), ("batch", None), ("sampling", None)]


def test_axes_see_the_arguments_of_our_script(host: Host):
    module = host.load(files()[0])
    ours = module.DpoOffset()
    ours.args_from, ours.args_to = 2, 6
    other = SimpleNamespace(title=lambda: "Other", args_from=0, args_to=2)
    p = SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=[other, ours]), script_args=(0, 1, True, "dpo", 0.5, ""))
    assert module.script_args(p) == (True, "dpo", 0.5, "")
    assert module.script_args(SimpleNamespace(scripts=None)) == ()


# ---- what all hosts share ----


def test_figures_are_kept_beside_the_hosts_own_caches(host: Host, monkeypatch: pytest.MonkeyPatch):
    webui = importlib.import_module("lib_dpo.hosts.a1111_family")
    found = webui.WebUI("AUTOMATIC1111", "1.10", SimpleNamespace(checks=list))
    monkeypatch.delenv("SD_WEBUI_CACHE_DIR", raising=False)
    assert found.cache_dir == Path("/webui/cache/dpo")
    monkeypatch.setenv("SD_WEBUI_CACHE_DIR", "/elsewhere")
    assert found.cache_dir == Path("/elsewhere/dpo")


@pytest.mark.parametrize("flag", ["interrupted", "skipped", "stopping_generation"])
def test_an_unfinished_picture_is_none(host: Host, monkeypatch: pytest.MonkeyPatch, flag: str):
    """A sampler that is stopped returns what it has; A1111's processing.py:935 clears `skipped` with the next picture only."""
    processing, shared = host.modules["modules.processing"], host.modules["modules.shared"]
    asked: list[dict[str, Any]] = []

    class Processing(SimpleNamespace):
        def close(self) -> None:
            asked.append(vars(self))

    def process_images(p: Any) -> Any:
        shared.state.skipped = False
        setattr(shared.state, flag, p.prompt == "stopped")
        return SimpleNamespace(images=["a picture"], infotexts=["its infotext"], comments="")

    processing.StableDiffusionProcessingTxt2Img, processing.process_images = Processing, process_images
    shared.sd_model = object()
    host.modules["modules.scripts"].ScriptRunner = SimpleNamespace
    webui = importlib.import_module("lib_dpo.hosts.a1111_family")
    live = SimpleNamespace(chosen=lambda: None)
    found = webui.WebUI("AUTOMATIC1111", "1.10", live)
    with found.job("Blind test"):
        assert found.generate(Request("whole", sampler="Euler"), None, 0.0) == Picture("a picture", "its infotext")
        with pytest.raises(Cancelled, match="nothing was left behind"):
            found.generate(Request("stopped", sampler="Euler"), None, 0.0)
    assert len(asked) == 2
    live.chosen = lambda: Path("/webui/models/Stable-diffusion/other.safetensors")
    with found.job("Compare"), pytest.raises(HostError, match="the checkpoint other was chosen while pictures"):
        found.generate(Request("whole", sampler="Euler"), None, 0.0)


def test_the_folder_that_answers_put_their_pictures_in_is_made(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Forge Neo sets it from the start and never makes it: every picture of an answer ends in gradio's bare "Error"."""
    webui = importlib.import_module("lib_dpo.hosts.a1111_family")
    opts = host.modules["modules.shared"].opts
    found = webui.WebUI("Forge Neo", "2.26", SimpleNamespace(checks=list))
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="4.40.0"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    for unset in ("", None):
        opts.temp_dir = unset
        found.check_pictures()
        assert all(check.ok for check in found.self_test())
        (tmp_path / "gradio").rmdir()
    opts.temp_dir = str(tmp_path / "data" / "tmp")
    found.check_pictures()
    assert (tmp_path / "data" / "tmp").is_dir()
    assert not list((tmp_path / "data" / "tmp").iterdir())
    (tmp_path / "file").touch()
    opts.temp_dir = str(tmp_path / "file" / "tmp")
    with pytest.raises(HostError, match=r"Not a directory.*Settings, Directory for temporary images"):
        found.check_pictures()
    (problem,) = [check for check in found.self_test() if not check.ok]
    assert opts.temp_dir in problem.text
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="3.41.2"))  # needs none
    found.check_pictures()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_a_folder_that_takes_no_file_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError):
    """It may be there and yet be another user's: /tmp/gradio on a machine that several share."""

    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.1.0"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(picture_folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(HostError, match=f"{error.strerror}.*GRADIO_TEMP_DIR"):
        picture_folder.check_picture_folder()


# ---- install.py ----


def run_install(**options: Any) -> list[str]:
    spec = importlib.util.spec_from_file_location("dpo_install", ROOT / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.problems(**options)
    return found


def test_install_is_content_with_the_supported_hosts():
    for versions in (
        {"torch": "2.1.2+cu121", "safetensors": "0.4.2", "numpy": "1.26.2", "gradio": "3.41.2", "fastapi": "0.94.0"},
        {"torch": "2.3.1", "safetensors": "0.4.2", "numpy": "1.26.2", "gradio": "4.40.0", "fastapi": "0.104.1"},
    ):
        assert run_install(version_of=versions.__getitem__) == []


def test_install_names_what_does_not_fit_and_installs_nothing():
    def version_of(name: str) -> str:
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "1.13.1", "gradio": "3.41.2"}.get(name, "99")

    assert run_install(python=(3, 9), version_of=version_of) == [
        "Python 3.9 is older than 3.10", "torch 1.13.1 is older than 2.1", "safetensors is not installed",
    ]  # fmt: skip
    text = (ROOT / "install.py").read_text(encoding="utf-8")
    assert "pip" not in text
    done = subprocess.run([sys.executable, str(ROOT / "install.py")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_what_a_webui_imports_at_its_start_is_light():
    program = (
        "import sys; from lib_dpo.webui import api, axes, generation, session, tab; from lib_dpo.webui.tab import script\n"
        "heavy = {'gradio', 'matplotlib', 'scipy', 'diffusers', 'lib_dpo.maths.lowrank', 'lib_dpo.operations.decompose', "
        "'lib_dpo.operations.extract'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
