"""How the models are computed fast: formulas by platform."""
