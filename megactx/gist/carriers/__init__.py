"""Ways to keep a block in little space, one file each (method 6): blocks in, ``SoftTokens`` or ``KVSlots`` out."""
