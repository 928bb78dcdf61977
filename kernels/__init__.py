"""Triton kernels; installed as ngd_fast.kernels. Importing this package needs no Triton, its modules do."""
