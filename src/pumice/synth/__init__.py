"""Instruction data: make LLaVA rows from captions and boxes with a teacher model, and check them."""
