"""Executables: the reference and ONNX Runtime. Backends import passes and ir, and nothing imports them but by entry point."""
