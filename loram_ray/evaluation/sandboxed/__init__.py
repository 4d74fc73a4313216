"""What runs inside the sandbox: a program in one process, and its tests in another.

`sandbox_child` imports this as a package of its own, so nothing here imports another part of
loram_ray.
"""
