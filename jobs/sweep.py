"""loram sweep as the entry point of a Ray job, on the cluster that it is submitted to.

    ray job submit --working-dir . -- python jobs/sweep.py --config jobs/configs/sweep.yaml

loram submit does this and more: it reads the run file first, follows, and tries again.
"""

from loram_ray.cli.main import main

if __name__ == "__main__":
    main("sweep", "--set", "ray.address=auto")
