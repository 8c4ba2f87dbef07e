"""Poolings: the states of a block [B, K, D] -> one vector [B, D]. One file each; the file's name is the setting.

A pooling is an ``nn.Module`` with ``__init__(width)``, ``forward(states) -> pooled`` and ``needs_cls``: with it the
backbone prepends one learned vector, and the states are [B, 1 + K, D]. A pooling that attends by itself, or reads some
rows only, may have ``attention(states, last)``: the weights [B, heads, queries, keys] by which it reads the block.
``last`` [B, A, K, K] are the weights of the backbone's last layer, which count for a pooling without ``attention``.
"""
