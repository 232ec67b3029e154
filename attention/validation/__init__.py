"""Validation: the attention core against plain attention over its whole matrix."""
