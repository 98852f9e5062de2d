"""Decoding: what a step is. Picking tokens, planning layouts, drafting, verifying."""
