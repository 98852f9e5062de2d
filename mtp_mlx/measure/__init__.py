"""Measuring: speed and text beside mlx-lm, answers, tuning, projections, and their pictures."""
