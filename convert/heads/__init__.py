"""Finds MTP heads in released checkpoints, converts them, and measures which convention they were trained for."""
