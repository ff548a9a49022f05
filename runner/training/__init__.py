"""The engine of training: batches, steps, optimizers, and what a training goes on from. It knows no family."""
