"""Layer by layer from the last layer to the input."""
