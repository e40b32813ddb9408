"""DPO offsets for Stable Diffusion: diff, extract as LoRA, bake, compare."""

__version__ = "0.1.0"
