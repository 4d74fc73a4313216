"""``python -m loram_ray.cli``."""

from loram_ray.cli.main import main

if __name__ == "__main__":
    main()
