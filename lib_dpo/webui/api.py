"""The HTTP API, /dpo/v1: what the tab does, for programs. Names come from the host's lists; files go below its folders.

Every POST starts a job and waits for it; `wait: false` answers at once, and `jobs/{id}` tells how it goes. Handlers are
plain functions, so that they run in threads and never hold up the server.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from inspect import isclass
from typing import Any, TypeVar, get_args, get_type_hints

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from pydantic import BaseModel

from lib_dpo.errors import BusyError, Cancelled, DpoError, NoMemoryError, NoModelError, NotAllowedError, NotFoundError
from lib_dpo.settings import ExtractSettings, RankPolicy
from lib_dpo.webui.api_requests import (
    AnalyseRequest,
    BakeRequest,
    BlindRequest,
    Body,
    CompareRequest,
    CompatRequest,
    ExtractRequest,
    OffsetRequest,
    Refusal,
    SaveRequest,
    VoteRequest,
    WaitRequest,
    check_body,
    check_names,
)  # fmt: skip
from lib_dpo.webui.comparing import Asked, compare
from lib_dpo.webui.jobs import Record, Work
from lib_dpo.webui.session import Session

PREFIX = "/dpo/v1"
Result = TypeVar("Result")
_STATUS: Mapping[type[DpoError], int] = {
    NotFoundError: 404,
    BusyError: 409,
    NoModelError: 409,
    Cancelled: 409,
    NotAllowedError: 403,
    NoMemoryError: 503,
}
_UNPROCESSABLE = 422
_REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": Refusal, "description": text}
    for code, text in (
        (403, "not allowed"), (404, "a name that is in no list"), (409, "nothing is loaded, or busy"),
        (_UNPROCESSABLE, "refused: detail says why"), (503, "no memory is left"),
    )
}  # fmt: skip
_CREDENTIALS = Depends(HTTPBasic())

_ROUTES = (  # method, path, which of the handlers below, what it does
    ("GET", "/status", "status", "what is loaded, what is baked into it, which hooks of the host were found"),
    ("GET", "/checkpoints", "checkpoints", "the names that other routes take: checkpoints, DPO references, offsets"),
    ("POST", "/analyse", "analyse", "the verdict on a pair, and on the loaded model as a target"),
    ("POST", "/extract", "extract", "extract a LoRA into the LoRA folder"),
    ("POST", "/offset", "offset", "write the dense offset file into the reference folder"),
    ("POST", "/bake", "bake", "add an offset to the loaded model, until unbake"),
    ("POST", "/unbake", "unbake", "put the loaded model back, bit for bit"),
    ("POST", "/save", "save", "write the loaded checkpoint plus strength x offset as a new checkpoint"),
    ("POST", "/compare", "compare", "one labelled grid, the untouched model first, and how strong the effect is"),
    ("POST", "/blind/start", "blind_start", "begin a blind test or go on with it, and draw the first pair"),
    ("GET", "/blind/pair", "blind_pair", "the pair to vote on: two PNGs, sides not told; ready is false while it is drawn"),
    ("POST", "/blind/vote", "blind_vote", "write a vote down; which side was which, and the figures"),
    ("GET", "/blind/figures", "blind_figures", "what the votes say: win rate, interval, e-value, best strength"),
    ("GET", "/blind/votes", "blind_votes", "the votes as JSON lines"),
    ("GET", "/inspect", "inspect", "what a file of the lists is"),
    ("POST", "/compat", "compat", "whether the offset of a pair fits a checkpoint, and whether DPO is in it already"),
    ("GET", "/jobs", "all_jobs", "all jobs that can be asked for"),
    ("GET", "/jobs/{job_id}", "job_state", "how a job goes"),
    ("POST", "/jobs/{job_id}/cancel", "cancel", "ask a job to stop; it does at the next tensor or picture"),
    ("DELETE", "/jobs/{job_id}", "cancel", "the same"),
)


def add_routes(app: FastAPI, session: Session) -> None:
    """Add all routes to the host's app. They ask for --api-auth where the host has it: it protects only its own routes."""
    guards = [Depends(_guard(session))]
    handlers = _Handlers(session)
    for method, path, handler, summary in _ROUTES:
        slug = path.strip("/").translate(str.maketrans("/", "_", "{}"))
        app.add_api_route(
            PREFIX + path,
            getattr(handlers, handler),
            methods=[method],
            summary=f"DPO: {summary}",
            tags=["dpo"],
            dependencies=[*guards, Depends(_nothing_guessed(getattr(handlers, handler), f"{method} {path}"))],
            responses=_REFUSALS,
            operation_id=f"dpo_{method.lower()}_{slug}",
        )


class _Handlers:
    """One for each route; plain `def`, so that the host runs them beside its own work and not in its event loop."""

    def __init__(self, session: Session) -> None:
        self._session, self._jobs = session, session.jobs

    def status(self, fingerprint: bool = False) -> dict[str, Any]:
        host = self._session.host
        found = {
            "host": {"name": host.name, "version": host.version},
            **self._session.status().as_json(),
            "self_test": [{"name": check.name, "ok": check.ok, "text": check.text} for check in host.self_test()],
            "jobs": [self._told(record, with_result=False) for record in self._jobs.all() if not record.is_over],
        }
        if fingerprint:
            found["fingerprint"] = self._refusing(self._fingerprint)
        return found

    def _fingerprint(self) -> dict[str, str]:
        return dict(self._jobs.run("fingerprint", lambda job: self._session.host.live.fingerprint()))

    def checkpoints(self) -> dict[str, list[str]]:
        library = self._session.library
        lists = {"checkpoints": library.checkpoints(), "references": library.references(), "offsets": library.offsets()}
        return {name: [entry.name for entry in entries] for name, entries in lists.items()}

    def analyse(self, req: AnalyseRequest) -> dict[str, Any]:
        options = _fields(req, "base", "reference", "spectra")
        return self._do("analyse", lambda job: self._session.analyse(job, **options).as_json(), req.wait)

    def extract(self, req: ExtractRequest) -> dict[str, Any]:
        def settings() -> ExtractSettings:
            policy = RankPolicy(req.rank, req.energy, req.size_mb, req.conv_rank)
            method: Any = req.method  # checked by ExtractSettings
            return ExtractSettings(policy, method, req.profile, req.precision, req.device, req.seed, req.form)

        chosen = self._refusing(settings)
        self._refusing(lambda: self._session.library.new_lora(req.name))
        options = _fields(req, "base", "reference", "name", "overwrite")

        def work(job: Any) -> dict[str, Any]:
            return self._session.extract(job, settings=chosen, **options).as_json()

        return self._do(f"extract {req.name}", work, req.wait)

    def offset(self, req: OffsetRequest) -> dict[str, Any]:
        self._refusing(lambda: self._session.library.new_offset(req.name))
        options = _fields(req, "base", "reference", "name", "precision", "overwrite")

        def work(job: Any) -> dict[str, Any]:
            report = self._session.write_offset(job, **options)
            return report.as_json() | {"output": report.path.name}

        return self._do(f"write offset {req.name}", work, req.wait)

    def bake(self, req: BakeRequest) -> dict[str, Any]:
        options = _fields(req, "offset", "strength", "blocks", "rank")
        return self._do("bake", lambda job: self._session.bake(job, **options).as_json(), req.wait)

    def unbake(self, req: WaitRequest | None = None) -> dict[str, Any]:
        wait = req.wait if req else True
        return self._do("unbake", lambda job: {"undone": self._session.unbake(job)}, wait)

    def save(self, req: SaveRequest) -> dict[str, Any]:
        self._refusing(lambda: self._session.library.new_checkpoint(req.name))
        options = _fields(req, "name", "offset", "strength", "blocks", "rank", "overwrite")

        def work(job: Any) -> dict[str, Any]:
            report = self._session.save(job, **options)
            return report.as_json() | {"output": report.path.name}

        return self._do(f"save {req.name}", work, req.wait)

    def compare(self, req: CompareRequest) -> dict[str, Any]:
        what = ("offset", "prompts", "negative", "seeds", "strengths", "blocks", "rank")
        options = _fields(req, *what, "steps", "cfg_scale", "sampler", "width", "height", "beside", "function", "undo")

        def work(job: Any) -> dict[str, Any]:
            found = compare(self._session, job, Asked(**options))
            grid = {"grid": base64.b64encode(found.grid.png()).decode(), "infotext": found.grid.infotext}
            kept = {**found.function.as_json(), "function_of": found.whole} if found.function else {}
            return {**found.report.as_json(), "remarks": list(found.remarks), **grid, **kept}

        return self._do("compare", work, req.wait)

    def blind_start(self, req: BlindRequest) -> dict[str, Any]:
        what = ("offset", "strengths", "prompts", "negative", "seeds", "blocks")
        options = _fields(req, *what, "steps", "cfg_scale", "sampler", "width", "height")

        def work(job: Any) -> dict[str, Any]:
            self._session.blind.start(job, **options)
            return self._session.blind.figures().as_json()

        return self._do("blind test", work, req.wait)

    def blind_pair(self) -> dict[str, Any]:
        asked = self._refusing(self._session.blind.current)
        if asked is None:
            return {"ready": False, "problem": self._session.library.names_only(self._session.blind.problem)}
        left, right = (base64.b64encode(data).decode() for data in asked.png)
        return {"ready": True, "pair": asked.id, "prompt": asked.prompt, "left": left, "right": right}

    def blind_vote(self, req: VoteRequest) -> dict[str, Any]:
        vote = self._refusing(lambda: self._session.blind.vote(req.pair, req.choice))
        found = {"vote": vote and asdict(vote)}  # null: that pair is not asked any more
        return found | {"figures": self.blind_figures()}

    def blind_figures(self) -> dict[str, Any]:
        return self._refusing(self._session.blind.figures).as_json()

    def blind_votes(self) -> dict[str, str]:
        return {"votes": self._refusing(self._session.blind.export)}

    def inspect(self, name: str) -> dict[str, Any]:
        found = self._refusing(lambda: self._session.inspect(name))
        return {**found.as_json(), "path": found.path.name, "title": found.title}

    def compat(self, req: CompatRequest) -> dict[str, Any]:
        options = _fields(req, "target", "base", "reference")
        return self._do("compat", lambda job: self._session.compat(job, **options).as_json(), req.wait)

    def all_jobs(self) -> list[dict[str, Any]]:
        return [self._told(record, with_result=False) for record in self._jobs.all()]

    def job_state(self, job_id: str) -> dict[str, Any]:
        return self._told(self._refusing(lambda: self._jobs.get(job_id)))

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._told(self._refusing(lambda: self._jobs.cancel(job_id)))

    # ---- jobs and refusals ----

    def _do(self, title: str, work: Work[Any], wait: bool) -> dict[str, Any]:
        """Run or start a job; its record, with the result when it is over."""
        if not wait:
            return self._told(self._refusing(lambda: self._jobs.start(title, work)))
        record = self._refusing(lambda: self._jobs.register(title))
        self._refusing(lambda: self._jobs.finish(record, work))
        return self._told(record)

    def _told(self, record: Record, *, with_result: bool = True) -> dict[str, Any]:
        found = record.as_json(with_result=with_result)
        return found | {"error": self._session.library.names_only(found["error"])}

    def _refusing(self, work: Callable[[], Result]) -> Result:
        """Turn what people are to read into an HTTP error with the sentence as its detail."""
        try:
            return work()
        except DpoError as error:
            status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), _UNPROCESSABLE)
            raise HTTPException(status_code=status, detail=self._session.library.names_only(str(error))) from error


def _fields(req: BaseModel, *names: str) -> dict[str, Any]:
    return {name: getattr(req, name) for name in names}


def _nothing_guessed(handler: Callable[..., Any], what: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency that refuses what a request should not hold, before pydantic drops or converts it."""
    hints = {name: kind for name, kind in get_type_hints(handler).items() if name != "return"}
    models = {name: each for name, kind in hints.items() for each in (kind, *get_args(kind)) if _is_body(each)}
    model = next(iter(models.values()), None)

    async def check(request: Request) -> None:
        queries = [name for name in hints if name not in models and name not in request.path_params]
        try:
            check_names((name for name, _ in request.query_params.multi_items()), queries, f"{what}, parameters")
            check_body(model, await request.body(), what)
        except DpoError as error:
            raise HTTPException(status_code=_UNPROCESSABLE, detail=str(error)) from error

    return check


def _is_body(kind: Any) -> bool:
    return isclass(kind) and issubclass(kind, Body)


def _guard(session: Session) -> Callable[..., None]:
    """A dependency that asks for the users and passwords of --api-auth, where there are any."""
    accounts = dict(session.host.api_auth())
    if not accounts:
        return lambda: None

    def check(credentials: HTTPBasicCredentials = _CREDENTIALS) -> None:
        expected = accounts.get(credentials.username, "")
        same = secrets.compare_digest(credentials.password.encode(), expected.encode())
        if not (same and credentials.username in accounts):
            raise HTTPException(status_code=401, detail="Incorrect username or password", headers={"WWW-Authenticate": "Basic"})

    return check
