"""What SD 1.x, SD 2.x and SDXL look like: layers, shapes, the names of one weight in every layout, and models read by them.

May import files and maths. Everything from offsets up may import it.
"""
