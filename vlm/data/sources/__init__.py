"""Files of samples, ours and in the layouts their authors publish, brought to the form of `vlm.sample`."""
