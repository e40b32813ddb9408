"""What people do in a WebUI: the session behind the tab, the API, the script and the X/Y/Z axes.

May import pictures and below, and not toy. scripts/ registers it with the host, and the command line serves it.
"""
