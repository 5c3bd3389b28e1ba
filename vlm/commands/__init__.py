"""What `vlm NAME` runs, one module per command."""
