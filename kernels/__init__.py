"""Tensor operations of the reuse path; import them from `prophetkv_rag.kernels.ops`."""
