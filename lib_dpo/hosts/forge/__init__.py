"""Forge, reForge, Forge Classic and Forge Neo: their live model, their patchers, and what tells the forks apart.

May import what hosts imports.
"""
