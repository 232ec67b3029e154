"""Pools: who hands out blocks, pages and slots, and counts the references to them."""
