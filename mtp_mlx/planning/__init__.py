"""Which drafts to verify, and what that costs: the planner behind `--layout auto`."""
