"""Blind votes: one line of JSON each, what they say of DPO, which strength they like best, and prompts to vote on.

May import what pictures imports; knows no pictures, no host and no page.
"""
