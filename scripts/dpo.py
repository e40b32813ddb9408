"""Registers everything with the WebUI: the tab, the settings, the API, the always-on script and the X/Y/Z axes.

The host executes this file at its start and again at every Reload UI, as a module of its own: nothing but registration here.
"""

from modules import script_callbacks, scripts, shared
from modules.ui_components import InputAccordion

from lib_dpo.hosts.a1111_family import ALLOW_PATHS, REFERENCE_DIR, xyz_module
from lib_dpo.hosts.detect import current_host
from lib_dpo.webui import api, axes, generation, tab
from lib_dpo.webui.session import Session
from lib_dpo.webui.tab.script import script_controls

session = Session(current_host())
hooks = generation.Generation(session)
NAME = "dpo"


class DpoOffset(scripts.Script):
    """The always-on script in txt2img and img2img."""

    def title(self):
        return generation.TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        components, self.infotext_fields, self.paste_field_names = script_controls(session, self.elem_id, InputAccordion)
        return components

    def process(self, p, *args):
        hooks.process(p, *args)

    def after_extra_networks_activate(self, p, *args, **kwargs):
        hooks.on_networks(p, kwargs.get("extra_network_data", {}))

    def process_batch(self, p, *args, **kwargs):
        hooks.on_batch(p)

    def process_before_every_sampling(self, p, *args, **kwargs):
        hooks.on_sampling(p)

    def postprocess_batch(self, p, *args, **kwargs):
        hooks.after_batch(p)


def script_args(p):
    """The arguments of our script in a `p`: an X/Y/Z axis overrides some of them."""
    ours = [script for script in p.scripts.alwayson_scripts if script.title() == generation.TITLE] if p.scripts else []
    return p.script_args[ours[0].args_from : ours[0].args_to] if ours else ()


def add_axes():
    """Append our axes to the X/Y/Z plot script, which is a new module after every Reload UI."""
    module = xyz_module()
    if module:
        axes.add_axes(module, session, script_args)


def add_settings():
    """Our section in the host's settings."""
    section = (NAME, generation.TITLE)
    options = {
        REFERENCE_DIR: shared.OptionInfo("", "Folder of DPO references and offset files", section=section).info(
            "whole checkpoints, UNets alone and diffusers folders; empty: models/DPO"
        ),
        ALLOW_PATHS: shared.OptionInfo(False, "Allow full paths in the place of names", section=section).info(
            "only when the WebUI is not reachable from other machines"
        ),
    }
    for key, option in options.items():
        shared.opts.add_option(key, option)
    shared.opts.restricted_opts |= options.keys()  # --hide-ui-dir-config keeps visitors from changing folders


def add_routes(demo, app):
    """The API; `demo` is None without a UI."""
    if shared.cmd_opts.api or demo is None:  # --nowebui is the API alone
        api.add_routes(app, session)


add_axes()  # here for --nowebui, where the axes are read before any callback; before_ui for everything else
script_callbacks.on_before_ui(add_axes)
script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_ui_tabs(lambda: [(tab.build(session), "DPO", NAME)])
script_callbacks.on_app_started(add_routes)
script_callbacks.on_model_loaded(lambda model: session.host.live.baked())  # let go of what a reload took away
