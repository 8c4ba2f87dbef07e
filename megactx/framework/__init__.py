"""What serves every stage: configs and what they may be (config), one run (run), what goes on beside a training
(callbacks), many runs (sweep); and what serves every command: files written whole, one lock, errors, a bar."""
