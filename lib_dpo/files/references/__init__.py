"""The published references: what is known of each, and how one of them gets here.

May import what files imports.
"""
