"""Bytes on disk: read safely, written whole."""
