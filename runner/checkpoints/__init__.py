"""From bytes to checkpoints: names, shapes, lazy tensors. No torch modules here."""
