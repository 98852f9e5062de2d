"""Who proposes tokens: one file per drafter."""
