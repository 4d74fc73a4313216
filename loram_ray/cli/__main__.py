"""Entry point of the ``loram`` command and of ``python -m loram_ray.cli``."""

from loram_ray.runtime.interruption import end_early

end_early()  # before the command's imports, which take seconds

from loram_ray.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
