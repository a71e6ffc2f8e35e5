"""Terms of the loss: reconstruction, semantic teacher, and the adversarial terms with their discriminators."""
