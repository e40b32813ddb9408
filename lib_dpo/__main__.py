"""`python -m lib_dpo`."""

from __future__ import annotations

import io
import os
import sys

from lib_dpo.cli import CANCELLED, main

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # no terminal is too old for our bars and other people's file names
        stream.reconfigure(errors="replace")
code = main()
if code == CANCELLED:  # threads may still be hashing or computing: an interpreter that ends under them can abort
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
