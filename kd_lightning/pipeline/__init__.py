"""From data to a verdict: what one training is, run it, quantise, measure, compare."""
