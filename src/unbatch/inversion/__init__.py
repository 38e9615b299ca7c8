"""What attacks and analyses share: one exchange looked at, and the steps that read it; never reaches the truth."""
