"""A step of decoding as one call of compiled code: C++ that the machine's own compiler builds once for its processor.

Optional: without a compiler the same step runs as torch operations, and a warning says so.
"""
