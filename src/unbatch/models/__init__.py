"""Networks: our own small ones, and the published ones."""
