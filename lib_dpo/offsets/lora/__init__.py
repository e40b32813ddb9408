"""LoRA files of every spelling: the grammar of their keys, their scales, what had no place; read as offsets, and written.

May import what offsets may.
"""
