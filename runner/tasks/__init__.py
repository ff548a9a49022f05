"""One page a task."""
