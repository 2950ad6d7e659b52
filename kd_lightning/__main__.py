"""``python -m kd_lightning``."""

from kd_lightning.cli import main

if __name__ == "__main__":
    main()
