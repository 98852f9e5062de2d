"""Drafts from what was written before: counts of n-grams in a memory-mapped file, and the running text."""
