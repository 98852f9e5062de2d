"""What lossy decoding costs: measurements of text against the model's own."""
