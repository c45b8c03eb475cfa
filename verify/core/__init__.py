"""What every judgement is made of: stages and their order, comparisons, bounds, choices and ties, the report, exit codes."""
