"""C code that decodes on a CPU, what compiles and loads it, and what the C library does with memory."""
