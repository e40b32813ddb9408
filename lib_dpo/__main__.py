"""`python -m lib_dpo`."""

from __future__ import annotations

import io
import sys

from lib_dpo.cli import main

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # no terminal is too old for our bars and other people's file names
        stream.reconfigure(errors="replace")
sys.exit(main())
