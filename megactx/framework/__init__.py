"""What serves every stage: search path, validation of configs, exact resume, callbacks, the run folder."""
