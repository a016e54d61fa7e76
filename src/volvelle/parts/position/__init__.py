"""Position encodings behind one protocol (encoding.py): one file each, with its equation and paper."""
