"""The command line: what can be typed, what is printed.

Imports everything; only __main__ imports it.
"""
