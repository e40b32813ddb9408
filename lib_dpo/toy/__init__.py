"""The small model that ships with the project: its pictures, their judge, its demo and its study.

May import pictures and below, and not webui. The command line runs it.
"""
