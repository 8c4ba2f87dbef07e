"""Corpora -> long documents -> batches. Knows nothing of models but how their files are named and read."""
