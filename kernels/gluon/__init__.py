"""Kernels in Gluon, Triton's language for one kind of GPU: here Hopper (compute capability 9.0)."""
