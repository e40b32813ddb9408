"""What all pages are made of, and every difference between gradio 3.41, 4.40 and the newest in one place.

gradio is imported inside functions: importing the tab costs nothing, and the library runs without it.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_dpo.errors import Cancelled, DpoError
from lib_dpo.progress import duration
from lib_dpo.settings import FIELDS
from lib_dpo.webui.results import Status
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup
from lib_dpo.webui.tab.standing import Place

logger = logging.getLogger(__name__)

LOADED = "The loaded checkpoint"  # the first choice where a checkpoint is asked for; `checkpoint_name` reads it

# For what the page asks by itself. Gradio 3.41 never lets go of a queued event whose page was closed meanwhile, and Reload UI
# waits for it.
UNASKED: Mapping[str, Any] = {"show_progress": "hidden", "queue": False}

_NOT_LOADED = "Make one picture and it will be: some WebUIs load it only then. Files can be chosen by name meanwhile."


@dataclass(frozen=True)
class Listed:
    """A dropdown of files: what it offers, and which of these is most likely meant where nothing is chosen yet."""

    component: Any
    choices: Callable[[Session], list[str]]
    likely: Callable[[list[str]], str]


@dataclass(frozen=True)
class Follower:
    """Components that look as the values of others want it."""

    inputs: list[Any]
    function: Callable[..., Any]
    components: list[Any]


class Work:
    """Long work that a click starts: where its answer goes, and the last one as long as no page says that it has it."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs
        self._lock = threading.Lock()
        self._answer: list[Any] | None = None
        self._since = 0.0

    def answered(self, answer: list[Any]) -> None:
        """Keep an answer for the next page, in case that its own was closed."""
        with self._lock:
            self._answer, self._since = answer, time.monotonic()

    def taken(self, waited: float = 0.0) -> list[Any] | None:
        """An answer that has waited for so many seconds, and is not kept any longer; None where there is none."""
        with self._lock:
            if self._answer is None or time.monotonic() - self._since < waited:
                return None
            answer, self._answer = self._answer, None
            return answer


@dataclass(frozen=True)
class Tab:
    """One tab while it is built: what its pages share, and what is wired when all of them stand."""

    session: Session
    status: Any
    task: Any  # invisible; the page writes the id of its progress bar into it
    lists: list[Listed] = field(default_factory=list)
    rescans: list[Any] = field(default_factory=list)  # buttons that look for new files
    writers: list[Any] = field(default_factory=list)  # events after which the lists are old
    followers: list[Follower] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)  # of answers that something else may make untrue
    doors: list[tuple[Any, str, Any, str]] = field(default_factory=list)  # button, list of another page, what it takes, page


# ---- components ----


def file_dropdown(
    tab: Tab, choices: Callable[[Session], list[str]], *, likely: Callable[[list[str]], str], **options: Any
) -> Any:
    """A list of files, with a button beside it that looks for new ones.

    Its choices come when the tab is shown. Gradio 4 refuses a value that is not among the choices that it knows, and
    its knowledge is older than the disk: names are checked by the library, when they are used.
    """
    import gradio as gr

    first = options.get("value")
    with gr.Row(elem_classes=["dpo-with-button"]):
        found = unsaved(gr.Dropdown(choices=[first] if first else [], allow_custom_value=True, **options))
        tab.rescans.append(refresh_button(f"{options['elem_id']}_refresh"))
    tab.lists.append(Listed(found, choices, likely))
    return found


def refresh_button(elem_id: str) -> Any:
    """Small, beside a list."""
    import gradio as gr

    return gr.Button("↻", elem_id=elem_id, elem_classes=["tool", "dpo-tool"])


def field_options(name: str) -> dict[str, Any]:
    """Label and help of a setting, from the one table of them."""
    return {"label": FIELDS[name].label, "info": _sentence(FIELDS[name].help)}


def picture(**options: Any) -> Any:
    """An image that the page shows and nobody uploads."""
    import gradio as gr

    if "format" in inspect.signature(gr.Image.__init__).parameters:
        options["format"] = "png"  # 4.x recompresses to webp
    return unsaved(gr.Image(type="pil", interactive=False, show_label=False, **options))  # a label would cover its corner


def unsaved(component: Any) -> Any:
    """A component whose value the WebUI shall not keep in ui-config.json."""
    component.do_not_save_to_config = True
    return component


def page(label: str, elem_id: str) -> Any:
    """One page of the tab. Gradio 6 leaves pages out of the document until they are opened, where JavaScript wants them."""
    import gradio as gr

    late = "render_children" in inspect.signature(gr.Tab.__init__).parameters
    options: dict[str, Any] = {"render_children": True} if late else {}
    return gr.Tab(label, elem_id=elem_id, **options)


def results(tab: Tab, elem_id: str, hint: str, *, keep: bool = False) -> Any:
    """Where the results of a page appear, in a column of its own: the host draws its progress bar on the top edge of it.

    An error stands above them and takes the place of none.

    Args:
        keep: results stay to be seen when they do not hold any more, below what has changed.
    """
    import gradio as gr

    with gr.Column(elem_id=f"{elem_id}_place", elem_classes=["dpo-results"]):
        alert = unsaved(gr.HTML("", elem_id=f"{elem_id}_alert"))
        found = unsaved(gr.HTML(markup.note(hint) if hint else "", elem_id=elem_id))
        tab.places.append(Place(found, gr.State(None), keep=keep, alert=alert))
        return found


def interrupt_button(tab: Tab, elem_id: str) -> None:
    """Stops what the tab is doing, not what others do. Not queued: it must not wait for what it stops."""
    import gradio as gr

    button = gr.Button("Interrupt", elem_id=elem_id, elem_classes=["dpo-interrupt"])
    on(button.click, tab.session.jobs.interrupt, [], [], queue=False)


def follow(
    tab: Tab,
    leaders: Sequence[Any],
    function: Callable[..., list[Any]],
    components: Sequence[Any],
    *,
    beside: Sequence[Any] = (),
) -> None:
    """Let components look as the values of others want it: at every change of these, and when the tab is shown.

    The WebUI restores values that its user saved after the tab was built, and tells nobody.

    Args:
        function: called with the values of `beside`, then of `leaders`; returns an update for each of the components.
    """
    inputs = [*beside, *leaders]

    def followed(*values: Any) -> Any:
        found = function(*values)
        return found if len(components) > 1 else found[0]  # gradio takes a list for the value of a single component

    for leader in leaders:
        on(leader.change, followed, inputs, components, **UNASKED)
    tab.followers.append(Follower(inputs, followed, list(components)))


# ---- events ----


def update(**changes: Any) -> Any:
    """A change of a component; without arguments none."""
    import gradio as gr

    return gr.update(**changes)


def on(event: Any, function: Callable[..., Any] | None, inputs: Sequence[Any], outputs: Sequence[Any], **options: Any) -> Any:
    """Wire an event: the keyword for JavaScript and the one that keeps it out of the page's API differ by version."""
    import gradio as gr

    major = int(gr.__version__.split(".")[0])
    if "js" in options and major < 4:
        options["_js"] = options.pop("js")
    options |= {"api_visibility": "private"} if major >= 6 else {"api_name": False}
    return event(fn=function, inputs=list(inputs), outputs=list(outputs), **options)


def error_html(session: Session, error: Exception) -> str:
    """An error as a sentence: ours as it is, the others with where to look; without the server's folders."""
    words = _labelled(session.library.names_only(str(error)))
    if isinstance(error, Cancelled):
        return markup.note(words)
    if isinstance(error, DpoError):
        return markup.alert(words)
    logger.exception("an action of the DPO tab failed", exc_info=error)
    return markup.alert(f"this should not happen: {type(error).__name__}: {words}. The console has the details.")


def _labelled(message: str) -> str:
    """A message about a setting with the label that the page has for it."""
    name, space, rest = message.partition(" ")
    return f"{FIELDS[name].label}{space}{rest}" if name in FIELDS else message


# ---- the state of things ----


def status_html(session: Session) -> str:
    """What is loaded and what is in it, checked now."""
    try:
        status = session.status()
    except Exception as error:  # noqa: BLE001  # the line must stand whatever the host says
        return error_html(session, error)
    problem = f'<span class="dpo-problem">{markup.text(status.problem)}</span>' if status.problem else ""
    if status.model is None:
        problem = f'<span class="dpo-hint">{markup.text(_NOT_LOADED)}</span>'
    work = "".join(f'<span class="dpo-hint">{markup.text(words)}</span>' for words in _at_work(session))
    return (
        f'<p class="dpo-status dpo-{_state(status)}" role="status"><span class="dpo-dot" aria-hidden="true"></span>'
        f"<span>{markup.text(status.text)}</span>{problem}{work}</p>"
    )


def _at_work(session: Session) -> Iterator[str]:
    """How far our jobs in the host are: of a page that was closed too, or of another one."""
    for job in session.jobs.all():
        if not job.is_over and not job.beside:
            left = f", about {duration(job.seconds_left)} left" if job.seconds_left is not None else ""
            yield f"{job.title}: {job.share:.0%}{left}" if job.state == "running" else f"{job.title}: waits for its turn"


def _state(status: Status) -> str:
    if status.model is None or status.problem:
        return "off"
    return "baked" if status.baked else "clean"


def checkpoint_name(choice: str | None) -> str:
    """A checkpoint as the session wants it: empty for the loaded one."""
    return "" if not choice or choice == LOADED else choice


def checkpoints(session: Session) -> list[str]:
    """The loaded one first."""
    return [LOADED, *(entry.name for entry in session.library.checkpoints())]


def references(session: Session) -> list[str]:
    """Tuned models by name."""
    return [entry.name for entry in session.library.references()]


def offsets(session: Session) -> list[str]:
    """LoRAs and offset files by name."""
    return [entry.name for entry in session.library.offsets()]


def named_dpo(choices: list[str]) -> str:
    """The first that says it is about DPO."""
    return next((name for name in choices if "dpo" in name.casefold()), "")


def first(choices: list[str]) -> str:
    """Whatever stands first."""
    return choices[0] if choices else ""


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
