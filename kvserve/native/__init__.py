"""Home of the compiled kernel libraries, one per instruction set (built by setup.py, loaded by ctypes)."""
