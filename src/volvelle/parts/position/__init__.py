"""Where a token stands: position encodings, one file each."""
