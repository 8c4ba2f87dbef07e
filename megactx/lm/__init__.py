"""The base LM as a function of embeddings, positions, mask and cache; every attention mask of the project."""

from .base import BaseLM

__all__ = ["BaseLM"]
