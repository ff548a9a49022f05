"""The engine of fine-tuning for classification: rows, head, what trains, steps, checkpoints."""
