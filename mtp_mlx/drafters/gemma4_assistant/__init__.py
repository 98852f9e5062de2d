"""Drafting with a Gemma 4 assistant: four layers that read the target's own keys and values, and keep none."""
