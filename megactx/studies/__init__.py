"""What trains several things and compares them in one run: the ladder of ways to compress a block."""
