"""Linear algebra on tensors: spans, linear systems, factorisations, traces."""
