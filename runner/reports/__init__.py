"""What people read: the console."""
