"""Sweeps: jobs that go on where they stopped, and grids of them."""
