"""Data sets in the layouts that their authors publish, brought to the form of `vlm.sample`."""
