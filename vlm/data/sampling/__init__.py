"""Which samples make an optimizer step, and how they are dealt."""
