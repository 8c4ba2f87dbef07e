"""Heads: the pooled vector [B, I] -> the gist's direction [B, D]. One file each; the file's name is the setting.

A head is an ``nn.Module`` with ``__init__(inputs, width)``, whose last linear layer is called ``last`` (a GistNet with
a skip starts it at zero).
"""
