"""A place to share trees: a catalogue with accounts, versions, rights and statistics, and its client."""
