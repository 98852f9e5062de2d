"""Adapters of others: PEFT LoRA, Parallel Token Prediction, models with a mask token."""
