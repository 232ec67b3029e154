"""Benchmarks: what `kvsim bench` measures."""
