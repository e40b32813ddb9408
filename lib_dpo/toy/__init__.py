"""A small world to try DPO offsets in: pictures of coloured shapes with captions, a judge, and the bundled model."""
