"""Fused paged attention in Triton, `impl="triton"`. Importing this package imports nothing of Triton."""
