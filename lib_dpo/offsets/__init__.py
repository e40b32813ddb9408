"""The offset, tuned minus base, whatever it comes from: a pair of checkpoints, an offset file, a LoRA.

May import families and below. Operations, hosts and all above may import it.
"""
