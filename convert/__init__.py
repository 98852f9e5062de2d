"""Checkpoints of other formats -> mlx-lm model folders. Imported as `mtp_mlx.convert`."""
