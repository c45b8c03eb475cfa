"""Before a build is made: its size and its cache by headers alone, recipes of bits, and conversion by them."""
