"""Projections: measured acceptance on published cost curves of other machines. Nothing here is a measurement."""
