"""One module for each thing that the tool does to files: extract, verify, resize, bake, diff, compat, inspect.

May import offsets and below. The face, the front ends and the toy call it; hosts call it to save.
"""
