"""An OpenAI-compatible service over sessions: each key has a memory of its own."""
