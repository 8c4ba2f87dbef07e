"""Heads: what the blocks of a LensNet end in, [B, W, D] -> [B, W, outputs], before the last linear layer makes values
of it. One file each; the file's name is the setting.

A head is an ``nn.Module`` with ``__init__(width)`` and ``outputs``.
"""
