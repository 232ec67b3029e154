"""Prefixes: what names cached content, finds it again, and decides what is given up."""
