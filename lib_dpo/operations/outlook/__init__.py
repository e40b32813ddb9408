"""What a pair's files say before a LoRA is written: measured once, remembered, and any size foreseen from it.

May import operations' `decompose`, `measure`, `rank_plan` and `verdict`, and what operations may.
"""
