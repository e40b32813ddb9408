"""Benchmarks, on made-up files with the real structure and size."""
