"""The small base model that the project ships, and the command that rebuilds it."""
