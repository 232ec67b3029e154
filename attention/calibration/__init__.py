"""Calibration: what attention, linear layers and moves of blocks cost on a device, and models fitted to it."""
