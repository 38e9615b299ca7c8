"""What a server plants to be sent sums over few examples, and how such sums are read and proven."""
