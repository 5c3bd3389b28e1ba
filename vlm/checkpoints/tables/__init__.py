"""Published names of tensors and ours, as tables that are read both ways."""
