"""`python -m reference.measure`: reference/training/measure.py, under its short name."""

from .training.measure import main

if __name__ == "__main__":
    main()
