"""PEFT's LoRA adapters: read and written."""
