"""The page Bake: an offset into the loaded model and out again, and as a checkpoint of its own.

May import what the other pages import.
"""
