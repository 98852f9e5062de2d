"""Parallel Token Prediction (arXiv 2512.21323): slots that are given the random numbers of sampling."""
