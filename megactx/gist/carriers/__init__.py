"""Ways to keep a block in little space, one file each (SPEC 6): blocks in, ``Vectors`` or ``Slots`` out."""
