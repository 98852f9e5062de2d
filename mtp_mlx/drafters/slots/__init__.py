"""What the methods that draft from slots have in common: layouts of training, the two passes, agreement, memory."""
