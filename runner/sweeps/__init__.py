"""Sweeps while they run: their jobs, launchers, progress, and how one goes on after it was cut off."""
