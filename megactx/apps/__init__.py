"""What people run: chat, generate, ingest, view, and the numbers that they give while they run."""
