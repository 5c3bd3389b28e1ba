"""Files on a disk: weights, atomic writes, where a path leads."""
