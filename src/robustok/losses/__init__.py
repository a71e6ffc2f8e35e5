"""What training minimises: reconstruction terms, the adversarial losses with their discriminators, the semantic loss."""
