"""Corpora -> long documents -> batches. Knows nothing of models."""
