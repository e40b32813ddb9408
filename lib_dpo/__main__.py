"""The command `dpo`, which is `python -m lib_dpo` too."""

from __future__ import annotations

import io
import os
import signal
import sys

CANCELLED = 130  # as in cli, which is not imported yet when somebody is quick


def run() -> int:
    """The command line, its imports included. Returns the exit code."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # no terminal is too old for our bars and other people's file names
                stream.reconfigure(errors="replace")
        from lib_dpo.cli.main import main

        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was to be done is done and told: Ctrl-C comes too late
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return CANCELLED
    return code


def console() -> None:
    """Run the command line and leave the process with its exit code."""
    code = run()
    if code == CANCELLED:  # threads may still be hashing or computing: an interpreter that ends under them can abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
