"""Parallel Token Prediction (arXiv 2512.21323): slots that carry the random numbers of sampling."""
