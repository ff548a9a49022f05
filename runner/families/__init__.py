"""What is special about each kind of model: one folder a family, the same file names in each."""
