"""Unmodified programs of public training libraries, watched as docs/trainers.md says."""
