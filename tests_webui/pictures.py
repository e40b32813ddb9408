"""Pictures by the WebUI's own API: small ones, in few steps, compared by their pixels."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from server import Server

PROMPT = "a red cat on a chair"
TITLE = "dpo offset"  # of our script, as the API names it
_PLAIN = {
    "seed": 1, "width": 64, "height": 64, "sampler_name": "Euler", "cfg_scale": 5, "do_not_save_samples": True,
    "do_not_save_grid": True,
}  # fmt: skip


@dataclass(frozen=True)
class Offset:
    """What our script is to do."""

    name: str
    strength: float = 1.0
    blocks: str = ""
    enabled: bool = True
    rank: int = 0

    def args(self) -> dict[str, Any]:
        return {TITLE: {"args": [self.enabled, self.name, self.strength, self.blocks, self.rank]}}


@dataclass(frozen=True)
class Pictures:
    """What one request gave."""

    pngs: list[bytes]
    infotexts: list[str]

    @property
    def all(self) -> list[np.ndarray]:
        return [pixels(png) for png in self.pngs]


def draw(server: Server, prompt: str = PROMPT, offset: Offset | None = None, **options: Any) -> np.ndarray:
    """One picture."""
    return request(server, prompt, offset, **options).all[0]


def known(server: Server, prompt: str = PROMPT, offset: Offset | None = None, **options: Any) -> np.ndarray:
    """The same for the clean base, drawn once by each process: what later pictures are compared with."""
    key = repr((prompt, offset, sorted(options.items())))
    if key not in server.known:
        server.known[key] = draw(server, prompt, offset, **options)
    return server.known[key]


def request(
    server: Server, prompt: str = PROMPT, offset: Offset | None = None, *, start: np.ndarray | None = None, **options: Any
) -> Pictures:
    """txt2img, or img2img where there is a picture to start from."""
    steps = 2 if server.flavour.any_width else 1  # models of the real size take seconds for each
    body = _PLAIN | {"steps": steps, "prompt": prompt, "alwayson_scripts": offset.args() if offset else {}} | options
    if options.get("enable_hr"):
        body |= dict(server.flavour.hires)
    if start is not None:
        body["init_images"] = [png_of(start)]
    answer = server.post("/sdapi/v1/txt2img" if start is None else "/sdapi/v1/img2img", **body)
    return Pictures([base64.b64decode(text) for text in answer["images"]], json.loads(answer["info"])["infotexts"])


HIRES = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 2}
Axis = tuple[str, Sequence[str]]


def grid(server: Server, x: Axis, y: Axis | None = None, offset: Offset | None = None, **options: Any) -> Pictures:
    """The cells of an X/Y/Z plot, row by row, without the grid itself."""
    found = request(server, offset=offset, script_name="x/y/z plot", script_args=grid_args(server, x, y), **options)
    count = len(x[1]) * (len(y[1]) if y else 1)
    return Pictures(found.pngs[1 : 1 + count], found.infotexts[1 : 1 + count])


def grid_args(server: Server, x: Axis, y: Axis | None = None) -> list[Any]:
    """The arguments of the X/Y/Z plot script, whose number and order differ by host: found by their labels."""
    args = xyz_info(server)["args"]
    values = [arg["value"] for arg in args]
    labels = [arg["label"] for arg in args]
    for letter, axis in (("X", x), ("Y", y), ("Z", None)):
        types = args[labels.index(f"{letter} type")]["choices"]
        label, wanted = axis or ("Nothing", ())
        values[labels.index(f"{letter} type")] = types.index(label)
        first = labels.index(f"{letter} values")
        values[first : first + 2] = [",".join(f'"{value}"' if "," in value else value for value in wanted), list(wanted)]
    values[labels.index("Include Sub Images")] = True
    values[labels.index("Draw legend")] = False
    return values


def axes(server: Server) -> list[str]:
    """The labels of all axes."""
    return [str(label) for label in next(arg for arg in xyz_info(server)["args"] if arg["label"] == "X type")["choices"]]


def xyz_info(server: Server, *, img2img: bool = False) -> Any:
    scripts = [info for info in server.get("/sdapi/v1/script-info") if info["name"].lower() == "x/y/z plot"]
    return next(info for info in scripts if info["is_img2img"] == img2img)


# ---- pixels ----


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int16)


def png_of(picture: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.shape == two.shape and bool((one == two).all())


def distance(one: np.ndarray, two: np.ndarray) -> float:
    """Mean difference of two pictures, of 255."""
    return float(np.abs(one - two).mean())
