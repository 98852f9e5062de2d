"""Converts adapters of other programs: PEFT LoRA, Parallel Token Prediction, models with a trained mask token."""
