"""Mask tokens: gated LoRA and a sampler head (arXiv 2507.11851), and the single mask token (arXiv 2602.06019)."""
