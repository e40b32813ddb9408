"""AUTOMATIC1111's WebUI 1.10: its live model, the prompts it has encoded, its built-in Lora extension.

May import what hosts imports.
"""
