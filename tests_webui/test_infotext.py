"""What a picture says of the offset, and a picture again from what it says."""

from __future__ import annotations

import base64
import io

import pytest
from conftest import LORA
from pictures import Offset, known, pixels, request, same
from PIL import Image
from server import Server

pytestmark = pytest.mark.usefixtures("lora")
BLOCKS = "IN=0.5,MID=0"


def test_keys(server: Server) -> None:
    text = request(server, offset=Offset(LORA, 0.7, BLOCKS)).infotexts[0]
    assert f"DPO offset: {LORA}, DPO strength: 0.7" in text
    assert f'DPO blocks: "{BLOCKS}"' in text
    assert "DPO" not in request(server).infotexts[0]


def test_png_info(server: Server) -> None:
    png = request(server, offset=Offset(LORA, 0.7, BLOCKS)).pngs[0]
    with Image.open(io.BytesIO(png)) as picture:
        assert "DPO offset" in picture.text["parameters"]
    found = server.post("/sdapi/v1/png-info", image="data:image/png;base64," + base64.b64encode(png).decode())["parameters"]
    assert (found["DPO offset"], float(found["DPO strength"]), found["DPO blocks"]) == (LORA, 0.7, BLOCKS)


def test_the_same_picture_from_its_infotext(server: Server) -> None:
    found = request(server, offset=Offset(LORA, 0.7, BLOCKS))
    body = {"infotext": found.infotexts[0], "do_not_save_samples": True, **dict(server.flavour.infotext_needs)}
    again = server.post("/sdapi/v1/txt2img", **body)["images"][0]
    assert same(pixels(base64.b64decode(again)), found.all[0])
    assert not same(found.all[0], known(server))
