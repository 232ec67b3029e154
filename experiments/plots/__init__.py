"""Plots: figures of an experiment, drawn from its stored results alone."""
