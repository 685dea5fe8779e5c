"""Instruction data: from captions and boxes, by a teacher, through checks, to LLaVA rows.

Knows: annotation files, prompts, teachers, journals, rows. Does not know: tensors; the only model that
it can reach is a local teacher's, opened by `pumice.assistant` when it is asked for.
"""
