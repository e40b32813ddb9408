"""Which WebUI this process is."""

from __future__ import annotations

import sys

from lib_dpo.errors import HostError
from lib_dpo.hosts.base import Host


def current_host() -> Host:
    """The host of the running WebUI, told from what it has loaded: nothing of a host is imported to find out.

    Raises:
        HostError: this process is no WebUI.
    """
    if "modules.shared" not in sys.modules:
        raise HostError("no WebUI is running in this process; use the command `dpo`")
    from lib_dpo.hosts.a1111_family import WebUI, host_version

    if "modules_forge" in sys.modules:
        from lib_dpo.hosts.forge.live import ForgeLive
        from lib_dpo.hosts.forge.modules import fork_name

        return WebUI(*fork_name(), ForgeLive())
    from lib_dpo.hosts.a1111.live import A1111Live

    return WebUI("AUTOMATIC1111", host_version(), A1111Live())
