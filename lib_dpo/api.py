"""The HTTP API, /dpo/v1: what the tab does, for programs. Names come from the host's lists; files go below its folders.

Every POST starts a job and waits for it; `wait: false` answers at once, and `jobs/{id}` tells how it goes. Handlers are
plain functions, so that they run in threads and never hold up the server.
"""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from pydantic import BaseModel, Field

from lib_dpo.errors import BusyError, Cancelled, DpoError, NoMemoryError, NoModelError, NotAllowedError, NotFoundError
from lib_dpo.jobs import Record, Work
from lib_dpo.session import Session
from lib_dpo.settings import FIELDS, ExtractSettings, RankPolicy

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
_CREDENTIALS = Depends(HTTPBasic())

_BASE = Field("", description="checkpoint before tuning, by name; empty: the loaded one")
_REFERENCE = Field(..., description="DPO reference, by name")
_NAME = Field(..., description="name of the file to write, without folders")
_OFFSET = Field(..., description="LoRA or offset file, by name")
_STRENGTH = Field(1.0, description=FIELDS["strength"].help)
_BLOCKS = Field("", description=FIELDS["blocks"].help)
_SIDE = FIELDS["side"].help + "; 0: what the model was made for"
_RANK = Field(None, description="keep the strongest components of each layer of a LoRA only")
_OVERWRITE = Field(False, description="replace an existing file of that name")
_WAIT = Field(True, description="answer when the job is over; false: at once, then ask for jobs/{id}")


class AnalyseRequest(BaseModel):
    """A pair to look at."""

    base: str = _BASE
    reference: str = _REFERENCE
    spectra: bool = Field(False, description="all singular values too: what a LoRA of a given rank or size can keep")
    wait: bool = _WAIT


class ExtractRequest(BaseModel):
    """A LoRA to extract; one of rank, energy, size_mb."""

    base: str = _BASE
    reference: str = _REFERENCE
    name: str = _NAME
    rank: int | None = Field(None, description=FIELDS["rank"].help)
    energy: float | None = Field(None, description=FIELDS["energy"].help)
    size_mb: float | None = Field(None, description=FIELDS["size_mb"].help)
    conv_rank: int | None = Field(None, description=FIELDS["conv_rank"].help)
    method: str = Field("auto", description=FIELDS["method"].help)
    profile: str = Field("portable", description=FIELDS["profile"].help)
    precision: str = Field("fp16", description=FIELDS["precision"].help)
    device: str = Field("auto", description=FIELDS["device"].help)
    seed: int = Field(0, description=FIELDS["seed"].help)
    overwrite: bool = _OVERWRITE
    wait: bool = _WAIT


class OffsetRequest(BaseModel):
    """A dense offset file to write into the reference folder."""

    base: str = _BASE
    reference: str = _REFERENCE
    name: str = _NAME
    precision: str = Field("fp32", description=FIELDS["precision"].help)
    overwrite: bool = _OVERWRITE
    wait: bool = _WAIT


class BakeRequest(BaseModel):
    """An offset to add to the loaded model."""

    offset: str = _OFFSET
    strength: float = _STRENGTH
    blocks: str = _BLOCKS
    rank: int | None = _RANK
    wait: bool = _WAIT


class WaitRequest(BaseModel):
    """Nothing but whether to wait."""

    wait: bool = _WAIT


class SaveRequest(BaseModel):
    """A checkpoint to write: the loaded one's file plus strength x offset."""

    name: str = _NAME
    offset: str = _OFFSET
    strength: float = _STRENGTH
    blocks: str = _BLOCKS
    rank: int | None = _RANK
    overwrite: bool = _OVERWRITE
    wait: bool = _WAIT


class CompareRequest(BaseModel):
    """A grid of pictures: prompts x seeds down, the untouched model and the strengths across."""

    offset: str = _OFFSET
    prompts: list[str] = Field(..., description="one row of pictures for each prompt and seed")
    negative: str = ""
    seeds: str = Field("1", description="such as 1, 2 or 100-103; -1 is random")
    strengths: str = Field("0.5, 1, 1.5", description="such as 0.5, 1 or 0-2 (+0.5)")
    blocks: str = _BLOCKS
    rank: int | None = _RANK
    steps: int = Field(20, description=FIELDS["steps"].help)
    cfg_scale: float = Field(7.0, description=FIELDS["cfg"].help)
    sampler: str = Field("", description="empty: the host's first")
    width: int = Field(0, description=_SIDE)
    height: int = Field(0, description=_SIDE)
    wait: bool = _WAIT


class CompatRequest(BaseModel):
    """Does the offset of a pair fit a checkpoint?"""

    target: str = Field("", description="checkpoint by name; empty: the loaded one")
    base: str = _BASE
    reference: str = _REFERENCE
    wait: bool = _WAIT


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
            dependencies=guards,
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
            return ExtractSettings(policy, method, req.profile, req.precision, req.device, req.seed)

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
        options = _fields(req, *what, "steps", "cfg_scale", "sampler", "width", "height")

        def work(job: Any) -> dict[str, Any]:
            found = self._session.compare(job, **options)
            grid = {"grid": base64.b64encode(found.grid.png()).decode(), "infotext": found.grid.infotext}
            return {**found.report.as_json(), **grid}

        return self._do("compare", work, req.wait)

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
        return found | {"error": self._names_only(found["error"])}

    def _refusing(self, work: Callable[[], Result]) -> Result:
        """Turn what people are to read into an HTTP error with the sentence as its detail."""
        try:
            return work()
        except DpoError as error:
            status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), _UNPROCESSABLE)
            raise HTTPException(status_code=status, detail=self._names_only(str(error))) from error

    def _names_only(self, text: str) -> str:
        """A message without the server's folders: callers know files by the names of the lists."""
        host = self._session.host
        for folder in (host.checkpoint_dir, host.lora_dir, host.reference_dir):
            text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), folder.name)
        return text


def _fields(req: BaseModel, *names: str) -> dict[str, Any]:
    return {name: getattr(req, name) for name in names}


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
