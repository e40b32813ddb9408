"""The models that run now, each behind the same `Host` (base.py): A1111, the Forge family, and no WebUI.

May import operations and below. Nothing but this room and scripts/ imports a WebUI's own modules.
"""
