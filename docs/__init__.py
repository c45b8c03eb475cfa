"""Pages, one a question (index.md), and what makes the generated parts of them (blocks.py)."""
