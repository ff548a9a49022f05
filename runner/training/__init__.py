"""Training of NPT layers and of the demonstration."""
