"""The folder to which gradio writes an answer's pictures: made and tried before the work, for gradio says only "Error"."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from lib_dpo.errors import HostError
from lib_dpo.hosts.base import Check, Host

_SINCE = 4  # gradio
_GRADIO = "set GRADIO_TEMP_DIR to another before the start"


def check_picture_folder(chosen: str = "", setting: str = "") -> None:
    """Make the folder, and write to it. Gradio 3 sends these pictures in the answer itself and needs no folder.

    Args:
        chosen: the host's setting; empty for gradio's own folder, in the system's temporary one.
        setting: where people change it.

    Raises:
        HostError: pictures cannot be written there: why, and what to do.
    """
    gradio = sys.modules.get("gradio")
    if gradio is None or int(gradio.__version__.split(".")[0]) < _SINCE:
        return
    folder = Path(chosen or os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 12))
    except OSError as error:
        remedy = f"choose another under {setting}" if chosen and setting else _GRADIO
        raise HostError(
            f"no picture could be shown: nothing can be written to the folder for them, {folder} ({error.strerror}); make it "
            f"writable, or {remedy}"
        ) from error


def pictures_check(host: Host) -> Check:
    """The same as a line of `Host.self_test`."""
    try:
        host.check_pictures()
    except HostError as error:
        return Check("folder of pictures", False, str(error))
    return Check("folder of pictures", True, "can be written to")
