"""Published folders: what their configuration says, read and written."""
