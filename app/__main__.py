"""``python -m app`` is ``vramplan``."""

from app.cli import main

if __name__ == "__main__":
    main()
