"""The page Extract: what DPO changed, as a LoRA or an offset file, and where references come from.

May import what the other pages import.
"""
