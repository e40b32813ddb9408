"""What keeps the tab true: the state of the model, the lists of files, and which of the host's hooks were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib_dpo.webui.session import Session
from lib_dpo.webui.tab import markup, parts, standing
from lib_dpo.webui.tab.parts import Listed, Tab

_LATE = 10.0  # seconds after which the page that asked must be closed: it says at once that it has its answer


def wire(tab: Tab, shown: Any, tick: Any, foot: Any) -> None:
    """Look again when the tab is shown (`shown` is pressed by the page), at a refresh button, after files were written.

    Every few seconds (`tick`) only at the model, and at what the answers on the page are about.
    """
    components = [listed.component for listed in tab.lists]
    outputs = [tab.status, foot, *components]

    def look(*chosen: Any) -> list[Any]:
        return looked(tab.session, tab.lists, chosen)

    def rescan(*chosen: Any) -> list[Any]:
        return looked(tab.session, tab.lists, chosen, rescan=True)

    parts.on(shown.click, look, components, outputs, **parts.UNASKED)
    for follower in tab.followers:
        parts.on(shown.click, follower.function, follower.inputs, follower.components, **parts.UNASKED)
    asked = [each for place in tab.places for each in (place.given, *place.inputs)]
    answers = [tab.status, *(each for place in tab.places for each in (place.component, place.given))]
    late = _others([each for work in tab.works for each in work.outputs], answers)

    def look_again(*values: Any) -> list[Any]:
        return arrived(tab, [*answers, *late], still_true(tab, *values))

    for event in (shown.click, tick.click):  # one request for all
        parts.on(event, look_again, asked, [*answers, *late], **parts.UNASKED)
    for button in tab.rescans:
        parts.on(button.click, rescan, components, outputs, **parts.UNASKED)
    for event in tab.writers:
        parts.on(event.then, look, components, outputs, **parts.UNASKED)


def still_true(tab: Tab, *values: Any) -> list[Any]:
    """Status line, and each place of an answer with what is kept of it; `values` are what is kept, and what it asks for."""
    found, rest = [parts.status_html(tab.session)], list(values)
    for place in tab.places:
        count = 1 + len(place.inputs)
        mine, rest = rest[:count], rest[count:]
        found += standing.looked_at(tab.session, place, *mine)
    return found


def arrived(tab: Tab, outputs: Sequence[Any], found: Sequence[Any]) -> list[Any]:
    """Values for `outputs`: `found` for the first of them, and before these the answers of work whose page was closed.

    Each of those answers is given once, to the page that looks first: others hear of the work from the files and the model.
    """
    values = {id(output): value for output, value in zip(outputs, found, strict=False)}  # there are more outputs
    for work in tab.works:
        if (answer := work.taken(_LATE)) is not None:
            values |= {
                id(output): value for output, value in zip(work.outputs, answer, strict=True) if output is not tab.status
            }
    return [values.get(id(output), parts.update()) for output in outputs]


def _others(components: Sequence[Any], known: Sequence[Any]) -> list[Any]:
    """Those that are not known, each once."""
    places = {id(each) for each in known}
    return list({id(each): each for each in components if id(each) not in places}.values())


def looked(session: Session, lists: Sequence[Listed], chosen: Sequence[Any], *, rescan: bool = False) -> list[Any]:
    """Status line, foot line, and what each list offers now; where nothing is chosen yet, what is most likely meant."""
    try:
        if rescan:
            session.host.refresh()
        offers = [listed.choices(session) for listed in lists]
    except Exception as error:  # noqa: BLE001  # a folder that cannot be read, a host that is not ready
        return [parts.error_html(session, error), foot_html(session), *(parts.update() for _ in lists)]
    updates = [_offer(listed, offer, value) for listed, offer, value in zip(lists, offers, chosen, strict=True)]
    return [parts.status_html(session), foot_html(session), *updates]


def _offer(listed: Listed, choices: list[str], chosen: Any) -> Any:
    likely = "" if chosen else listed.likely(choices)
    return parts.update(choices=choices, value=likely) if likely else parts.update(choices=choices)


def foot_html(session: Session) -> str:
    """Host, version, and the hooks in it that we need; open where one is missing."""
    host = session.host
    try:
        checks = list(host.self_test())
    except Exception as error:  # noqa: BLE001  # the page must stand without it
        return parts.error_html(session, error)
    missing = [check for check in checks if not check.ok]
    words = "everything that DPO needs was found" if not missing else f"{len(missing)} of {len(checks)} hooks missing"
    rows = "".join(
        f"<li>{'✓' if check.ok else '✗'} <b>{markup.text(check.name)}</b> {markup.text(check.text)}</li>" for check in checks
    )
    summary = f"{host.name} {host.version}: {words}"
    return f'<div class="dpo-foot">{markup.folded(summary, f"<ul>{rows}</ul>", is_open=bool(missing))}</div>'
