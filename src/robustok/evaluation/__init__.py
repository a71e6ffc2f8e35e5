"""What `evaluate` does: the judge, who knows the real images, and what each kind of thing is asked."""
