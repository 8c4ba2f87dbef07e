"""What goes on beside a training: checkpoints, logs, what is watched and what ends it."""
