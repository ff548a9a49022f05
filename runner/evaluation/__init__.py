"""From a checkpoint to figures: base model, placement, forward passes, reference."""
