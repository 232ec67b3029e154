"""Parity: recorded answers of real engines against the same operations on our own classes."""
