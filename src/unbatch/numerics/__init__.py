"""Pure functions on tensors; nothing here imports the rest of unbatch."""
