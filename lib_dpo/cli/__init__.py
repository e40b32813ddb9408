"""The command line: what can be typed, what is printed.

May import everything; only __main__ imports it.
"""
