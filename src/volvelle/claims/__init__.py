"""One file a technique: what the paper says, and what is measured here."""
