"""llama.cpp's GGUF: read and written."""
