"""loram batch as the entry point of a Ray job, on the cluster that it is submitted to.

    ray job submit --working-dir . -- python jobs/batch.py --config jobs/configs/batch.yaml

loram submit does this and more: it reads the run file first, follows, and tries again.
"""

from loram_ray.cli.main import main

if __name__ == "__main__":
    main("batch", "--set", "ray.address=auto")
