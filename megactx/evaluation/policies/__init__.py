"""Policies of focus that look at text and need no training: one file each, see ``megactx.evaluation.policy``."""
