"""What the jobs of a sweep found, side by side: rows, curves, what differs, what it means."""
