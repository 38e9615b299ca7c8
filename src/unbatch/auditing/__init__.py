"""The side that knows the truth: the client, the audit, the judge and what is said of them."""
