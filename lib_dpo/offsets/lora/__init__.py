"""LoRA files of every spelling, read as offsets: the grammar of their keys, their scales, what had no place.

Imports what offsets imports.
"""
