"""loram compare as the entry point of a Ray job, on the cluster that it is submitted to.

    ray job submit --working-dir . -- python jobs/compare.py --config jobs/configs/compare.yaml

loram submit does this and more: it reads the run file first, follows, and tries again.
"""

from loram_ray.cli.main import main

if __name__ == "__main__":
    main("compare", "--set", "ray.address=auto")
