"""`python -m reference.train`: reference/training/train.py, under its short name."""

from .training.train import main

if __name__ == "__main__":
    main()
