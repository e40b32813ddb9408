"""The WebUIs that the library runs in, each behind the same `Host` (base.py)."""
