"""One GPU, one command, under ten minutes: is the CUDA path right, and how fast is it? (`docs/gpu.md`)"""
