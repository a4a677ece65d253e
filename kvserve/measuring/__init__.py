"""What measurements have in common: engines in child processes, the machine they run on, and their results."""
