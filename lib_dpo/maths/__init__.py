"""Matrices in, factors out: SVD, ranks, exact addition, number formats, devices, threads, processes. Knows no model and
no file.

May import only errors, progress and settings. Everything from families up may import it.
"""
