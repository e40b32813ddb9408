"""Files as they lie on the disk: headers, hashes, names, the hub; read lazily, written whole or not at all.

May import only errors, progress and settings. Every room above reads and writes through it.
"""
