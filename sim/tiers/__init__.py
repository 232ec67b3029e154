"""Tiers: where cached prefixes go that the device has no room for."""
