"""Heads for early exit: what they read, how they are trained, and which threshold lets rows leave."""
