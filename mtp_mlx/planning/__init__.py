"""The planner behind layout "auto": which drafts to verify, and what that costs."""
