"""MTP heads on the trunk: cascades (arXiv 2603.23911 and released checkpoints), Medusa's and Meta's."""
