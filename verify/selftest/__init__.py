"""The gate itself on trial: faults seeded, the definition mutated, the rules of others asked."""
