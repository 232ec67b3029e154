"""Generation: a small transformer that decodes for real over a paged cache."""
