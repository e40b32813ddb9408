"""What the tool does to files: extract, write_offset, verify, resize, bake, diff, compat, inspect, and what these share.

May import offsets and below. The face, the front ends and the toy call it.
"""
