"""Making images from recipes."""
