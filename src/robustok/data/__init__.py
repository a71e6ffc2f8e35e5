"""Images and latents on disk, and the batches that training and evaluation read from them."""
