"""Policies of curation, one a file: ``choose(blocks, **settings)`` says which blocks, bool [N], it would take away.

``keep`` says which blocks stay whatever the others say.
"""
