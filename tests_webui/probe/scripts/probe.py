"""An extension that times another: what scripts/dpo.py costs at the start of a WebUI and when it is switched off.

GET /dpo-probe tells it. It is loaded before the one it times, and by the tests only.
"""

import functools
import time

from modules import script_callbacks, script_loading, scripts

OURS, TITLE = "sd-webui-dpo", "DPO offset"
HOOKS = ("process", "after_extra_networks_activate", "process_batch", "process_before_every_sampling")
spent: dict[str, list[float]] = {}


def timed(name, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.setdefault(name, []).append(time.perf_counter() - began)

    return call


def load_module(path):
    if OURS in str(path):
        return timed("import", plain_load_module)(path)
    return plain_load_module(path)


def time_the_rest():
    """All scripts are loaded and nothing is built: put clocks into the script and the tab."""
    import lib_dpo.webui.tab

    lib_dpo.webui.tab.build = timed("tab", lib_dpo.webui.tab.build)
    for data in scripts.scripts_data:
        if getattr(data.module, "NAME", "") == "dpo" and data.script_class.__name__ == "DpoOffset":
            for name in ("ui", *HOOKS):
                setattr(data.script_class, name, timed(name, getattr(data.script_class, name)))


def tell(demo, app):
    app.add_api_route("/dpo-probe", lambda: spent, methods=["GET"])


plain_load_module = script_loading.load_module
script_loading.load_module = load_module
script_callbacks.on_before_ui(time_the_rest)
script_callbacks.on_app_started(tell)
