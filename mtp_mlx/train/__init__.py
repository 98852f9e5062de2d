"""Training that no method is special to: data, trainer, checkpoints, memory, and the `Method` it drives."""
