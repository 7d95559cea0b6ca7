"""The kernels of the CPU: bindings to the native library, with the names and signatures of kernels/reference.py."""
