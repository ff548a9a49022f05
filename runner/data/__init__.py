"""Prompts, text and the built-in small world."""
