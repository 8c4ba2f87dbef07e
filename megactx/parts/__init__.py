"""Trained parts on disk: where they are, what they were built from, whether they belong together, how they are kept.

A part is named by ``asset:NAME``, a folder of ``save_gistnet`` or ``save_lensnet``, an exported folder, a checkpoint,
or a run folder, of which the best checkpoint counts.
"""
