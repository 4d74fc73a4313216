"""loram run as the entry point of a Ray job, on the cluster that it is submitted to.

    ray job submit --working-dir . -- python jobs/pipeline.py --config jobs/configs/demo.yaml

loram submit does this and more: it reads the run file first, follows, and tries again.
"""

from loram_ray.cli.main import main

if __name__ == "__main__":
    main("run", "--set", "ray.address=auto")
