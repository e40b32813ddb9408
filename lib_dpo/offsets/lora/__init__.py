"""LoRA files of every spelling, read as offsets: the grammar of their keys, their scales, what had no place.

May import what offsets imports.
"""
