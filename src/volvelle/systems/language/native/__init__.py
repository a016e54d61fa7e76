"""A step of decoding as one call of compiled code: step.cpp and kernels.h, built once with the machine's C++ compiler.

Optional: without a compiler the same step runs as torch operations, and a warning says so.
"""
