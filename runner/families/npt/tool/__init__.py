"""The interactive tool of knowledge transfer: a session, and its commands."""
