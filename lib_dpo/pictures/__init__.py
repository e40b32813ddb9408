"""Pictures and what they show: comparison grids, difference maps, effect figures, the charts of diff.

May import hosts and below. The tab, the toy and the command line draw with it.
"""
