"""An extension that lets the WebUI build a CLIP-G 64 wide, for the tests' small SDXL. It is loaded by the tests only."""

from pathlib import Path

import open_clip

open_clip.add_model_config(Path(__file__).resolve().parent.parent / "dpo-micro-clip.json")
