"""Runs and comparisons -> what CI reads: JSON, Markdown, annotations, JUnit."""
