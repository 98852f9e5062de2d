"""Who proposes tokens: one room a drafter, one line of `registry.py` for each."""
