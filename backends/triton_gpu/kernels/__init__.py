"""Triton kernels and their launchers, one idea a file. Nothing here is imported before a kernel is launched or compiled.

`TRITON_INTERPRET=1`, set before the import, runs them on CPUs.
"""
