"""Getting a reference: what is here and what can be fetched, the fetch itself, and which checkpoint is the base of it.

May import what webui imports, but no session.
"""
