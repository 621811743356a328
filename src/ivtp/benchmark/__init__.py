"""Time on the clock: full model, pruned model, and the oracle that is handed the same token counts for free.

`asked` says what to measure and `sweep` goes through it. `models` and `prompts` make what is timed, `runs` the
contestants. `measure`, `parts`, `memory` and `compiled` take the numbers, `results` keeps them, and `table`, `growth`
and `plot` show them.
"""
