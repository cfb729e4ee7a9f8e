"""How `builtin:shapes` was made: captions, autoencoder, U-Net, and the score on held-out captions."""
