"""How much may be computed at run time: what a budget costs, measured, and a monitor of live prompts."""
