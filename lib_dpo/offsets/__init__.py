"""The offset, tuned minus base, whatever it comes from: a pair of checkpoints, an offset file, a LoRA.

Imports families and below. Operations, hosts and all above may import it.
"""
