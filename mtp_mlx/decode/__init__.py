"""Decoding: the loop, the acceptance rule, and the interfaces of drafters and policies."""
