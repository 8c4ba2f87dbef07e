"""GistNet, its poolings and heads; packed substitution, losses, controls."""

from .gistnet import GistNet

__all__ = ["GistNet"]
