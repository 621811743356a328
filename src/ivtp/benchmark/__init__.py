"""Time on the clock: full model, pruned model, and the oracle that is handed the same token counts for free."""
