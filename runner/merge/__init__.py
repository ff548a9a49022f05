"""Several checkpoints into one: what goes where, how it is written, and how it is held against its sources."""
