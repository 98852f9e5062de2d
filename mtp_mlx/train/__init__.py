"""Training: data, distillation, objectives, the trainer."""
