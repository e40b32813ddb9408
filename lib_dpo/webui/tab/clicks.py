"""Long work at a click, in a thread that goes on where the page is closed meanwhile: the next page gets its answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from lib_dpo.webui.session import Session
from lib_dpo.webui.tab.parts import UNASKED, Tab, Work, error_html, on, status_html, update
from lib_dpo.webui.tab.standing import About, Given, given

Show = Callable[..., None]  # puts values into the first outputs of an event that is at work


def start(
    tab: Tab,
    button: Any,
    function: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    about: Callable[..., About],
    writes: Literal["", "offset", "checkpoint"] = "",
    streams: bool = False,
) -> None:
    """Long work at a click.

    Args:
        function: called with the id of the page's progress bar (None without one) and the inputs; returns HTML for the
            first output, and the values of the others.
        outputs: the first, one of `results`, shows results and errors; the page's progress bar appears above it.
        about: called with the inputs after the work; what the result is true of.
        writes: what kind of file: lists are old afterwards, the host's own of checkpoints only where it is one.
        streams: whether the function takes `show`, which puts values into the first outputs while it works.
    """
    place = outputs[0].elem_id
    own = f"values.slice(0, {len(inputs) + 1})"
    (standing,) = (each for each in tab.places if each.component is outputs[0])

    this = Work([standing.alert, *outputs, tab.status, standing.given])
    tab.works.append(this)

    def work(task: str, *values: Any, **options: Any) -> list[Any]:
        kept: list[Given | None] = []

        def noted(*arguments: Any) -> list[Any]:
            found = _listed(function(*arguments, **options))
            kept.append(given(found[0], lambda: about(*values)))
            return found

        first, *rest = guarded(tab.session, noted, len(outputs))(task, *values)
        # after an error the answer before it stands
        answer = ["", first, *rest, kept[0]] if kept else [first, update(), *rest, update()]
        this.answered(answer)
        return answer

    def taken() -> None:
        this.taken()

    def stream(task: str, *values: Any) -> Iterator[list[Any]]:
        def shown(show: Show) -> list[Any]:
            return work(task, *values, show=lambda *found: show(update(), *found))  # above the outputs stand errors

        yield from streamed(shown, len(outputs) + 3)

    event = on(
        button.click,
        stream if streams else work,
        [tab.task, *inputs],
        this.outputs,
        # older gradio hands over the outputs' values too
        js=f"(...values) => window.dpoStart ? dpoStart('{place}', {own}) : {own}",
        **({"show_progress": "hidden"} if streams else {}),  # what is shown meanwhile says how far it is
    )
    if writes:
        tab.writers.append(event)
    on(event.then, None, [], [], js=f"() => {{ window.dpoEnd && dpoEnd('{place}', '{writes}'); }}")
    # the page asks for what comes next: one that was closed meanwhile does not
    on(event.then, taken, [], [], **UNASKED)


def unseen(*values: Any) -> None:
    """`show` where nobody looks."""


def streamed(work: Callable[..., list[Any]], outputs: int) -> Iterator[list[Any]]:
    """What work in a thread of its own shows on its way, and then its result: it goes on where the page is closed meanwhile.

    Args:
        work: takes `show`, to be called with the values of the first outputs.
    """
    seen: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
    done: list[list[Any]] = []

    def run() -> None:
        try:
            done.append(work(show=lambda *values: seen.put(values)))
        finally:
            seen.put(None)

    threading.Thread(target=run, name="dpo page", daemon=True).start()
    while (values := seen.get()) is not None:
        yield [*values, *(update() for _ in range(outputs - len(values)))]
    yield done[0]


def guarded(session: Session, function: Callable[..., Any], outputs: int) -> Callable[..., list[Any]]:
    """An event that shows errors in its first output and the state of the model in one more at the end."""

    def event(task: str, *values: Any) -> list[Any]:
        try:
            found = _listed(function(task or None, *values))
        except Exception as error:  # noqa: BLE001  # the edge: nothing may go further
            found = [error_html(session, error)]
        return [*found, *(update() for _ in range(outputs - len(found))), status_html(session)]

    return event


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, (tuple, list)) else [found]
