"""Ways of running a model: the definition, HF, the equations, somebody's code; and what they are run on, by its headers."""
