"""Reports -> logs, files and people."""
