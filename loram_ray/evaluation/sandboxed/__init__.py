"""What runs inside the sandbox: a program in one process, and its tests in another.

`confined` imports this as a package of its own, so nothing here imports another part of loram_ray.
"""
