"""One run: its folder, its length, its devices, where it goes on, and a curriculum of several."""
