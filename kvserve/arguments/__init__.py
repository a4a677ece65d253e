"""What command lines have in common: option types, the model, and the options that make up a policy."""
