"""Where results are logged."""
