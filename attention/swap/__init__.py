"""Swap: blocks between the device and a host pool, whole or quantised."""
