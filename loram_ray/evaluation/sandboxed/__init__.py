"""Code that runs inside the sandbox: a program in one process, and its tests in another.

`sandbox_child` imports this as a top-level package, so nothing here may import other parts of
loram_ray.
"""
