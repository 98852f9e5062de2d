"""What drafters with slots share: the adapter, training layouts, the two passes, measured acceptance, memory."""
