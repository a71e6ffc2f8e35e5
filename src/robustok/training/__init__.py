"""The three trainings: tokenizer, generator, and the decoder against the generator."""
