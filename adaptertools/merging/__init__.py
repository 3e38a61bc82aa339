"""Base weights and adapters in, merged checkpoint out: edits say what, the plan where, the run does it."""
