"""`vlm check-data`: every sample as a run would meet it; what is wrong, what is unusual, what there is.

samples -> scan (worker processes, arrays) -> statistics -> report -> terminal, JSON, page, quarantine
"""
