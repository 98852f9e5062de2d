"""Converts checkpoints of other formats to mlx-lm model and adapter folders. Imported as `mtp_mlx.convert`."""
