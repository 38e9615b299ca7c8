"""Windows: the patches that a convolution looks at, told apart in the span that its gradient gives away."""
