"""What `evaluate` does: the evaluator, who knows the real images, and what each kind of thing is asked."""
