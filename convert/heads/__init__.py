"""MTP heads of released checkpoints: families, plans, folders, and what measuring them says."""
