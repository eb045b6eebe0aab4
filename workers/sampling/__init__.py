"""From logits to tokens: rules of the rows, grammars, log-probabilities."""
