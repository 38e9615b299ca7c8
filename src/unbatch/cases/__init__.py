"""Cases, one family of clients per file; found, never listed."""
