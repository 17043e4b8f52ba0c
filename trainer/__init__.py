"""Time: what happens in a step, and from one step to the next."""
