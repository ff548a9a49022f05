"""Torch modules. No file access here."""
