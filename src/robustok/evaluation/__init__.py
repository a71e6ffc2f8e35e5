"""What the `evaluate` command measures."""
